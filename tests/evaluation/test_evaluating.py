"""A model scored end to end: real tiny models, real files, the answers against transformers' own, and what is used again."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from models import write_adapter, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from abba_cli.errors import DataError, ModelError, RunError
from abba_cli.evaluating import evaluate
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Completion, Request
from abba_cli.evaluation.journal import Journal
from abba_cli.evaluation.options import EvaluationOptions
from abba_cli.evaluation.results import Results, TaskResult, read_results
from abba_cli.events import Event, Note, Scored
from abba_cli.merging import merge
from abba_cli.speakers import Source, load_for_generation

Heard = list[Event]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions of four choices and one program in the sources' own columns, and a task of our own: 12 sums."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(5)
    choices = [{"text": ["a cat", "a dog", "a cow", "a hen"], "label": list("ABCD")} for _ in range(60)]
    arc = [
        {"question": f"Which one is number {number}?", "choices": one, "answerKey": draw.choice("ABCD")}
        for number, one in enumerate(choices)
    ]
    sums = [{"question": f"What is {a} + {a}?", "answer": f"{a} and {a}.\n#### {2 * a}"} for a in range(12)]
    program = {
        "task_id": "HumanEval/0",
        "prompt": "def double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    }
    (folder / "sums.yaml").write_text(
        "name: sums\ndata: {path: sums/test.jsonl}\nprompt: '{{ question }}'\nanswer: '{{ answer }}'\nmetric: number\n"
        "max_tokens: 12\n"
    )
    for place, rows in {"arc_c/test": arc, "sums/test": sums, "humaneval/HumanEval": [program]}.items():
        file = folder / f"{place}.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", tiny_llama)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "trained", base)


def scored(source: Source, output: Path, data: Path, *tasks: str, **options: Any) -> tuple[Results, Heard]:
    heard: Heard = []
    given = {"data_dir": data, "output": output, "batch_size": 4} | options
    named = tuple(str(data / "sums.yaml") if task == "sums" else task for task in tasks or ("sums",))
    results, folder = evaluate(source, EvaluationOptions(named, **given), heard.append)
    assert folder == output
    assert read_results(output) == results
    return results, heard


def answers(output: Path) -> dict[tuple[str, str, int, int], str]:
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return {(row["model"], row["task"], row["row"], row["sample"]): row["response"] for row in rows}


def asked_anew(heard: Heard) -> int:
    last = {(event.model, event.task): event for event in heard if isinstance(event, Scored)}
    return sum(event.done - event.reused for event in last.values())


def test_the_adapters_answers_are_the_merged_models(base: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    merge([str(adapter)], output=tmp_path / "merged", verify=False)
    scored(Source(str(adapter), template="none", dtype="float32"), tmp_path / "a", data)
    scored(Source(model=str(tmp_path / "merged"), template="none"), tmp_path / "m", data)
    own, merged = (list(answers(tmp_path / name).values()) for name in "am")
    assert own == merged
    assert len(own) == 12
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = tokenizer("What is 7 + 7?", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :])
    assert answers(tmp_path / "a")[(str(adapter), "sums", 7, 0)] in text


def test_the_baseline_is_the_untouched_base(base: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    beside, _ = scored(
        Source(str(adapter), template="none", dtype="float32"), tmp_path / "both", data, "arc_c", "sums", baseline=True
    )
    alone, _ = scored(Source(model=str(base), template="none"), tmp_path / "alone", data, "arc_c", "sums")
    assert [model.role for model in beside.models] == ["baseline", "model"]
    assert beside.models[0].fingerprint == alone.models[0].fingerprint != beside.models[1].fingerprint
    both = answers(tmp_path / "both")
    assert [text for (model, *_), text in both.items() if model == beside.models[0].label] == list(
        answers(tmp_path / "alone").values()
    )
    own = [one for one in beside.results if one.model == str(adapter)]
    assert [one.task for one in own] == ["arc_c", "sums"]
    for one in own:
        assert one.difference is not None
        assert one.difference.n == one.n
        assert one.difference.test == "McNemar exact"


def test_a_random_model_scores_zero_with_every_extraction_failed(base: Path, data: Path, tmp_path: Path) -> None:
    results, _ = scored(Source(model=str(base), template="none"), tmp_path, data, "arc_c")
    [one] = results.results
    assert (one.value, one.n, one.extraction_failures) == (0.0, 60, 60)
    assert one.interval == (pytest.approx(0.0), pytest.approx(0.0602, abs=1e-4))  # Wilson: z^2 / (n + z^2)
    assert len(one.examples) == 3
    assert one.examples[0].prompt.startswith("Please choose the correct answer to the question: Which one is number 0?")


def test_the_same_command_twice_asks_nothing_and_finds_the_same(base: Path, data: Path, tmp_path: Path) -> None:
    source = Source(model=str(base), template="none")
    first, heard = scored(source, tmp_path, data, "arc_c", "sums")
    assert asked_anew(heard) == 72
    samples = (tmp_path / "samples.jsonl").read_text()
    again, heard = scored(source, tmp_path, data, "arc_c", "sums")
    assert asked_anew(heard) == 0
    assert again.results == first.results
    assert (tmp_path / "samples.jsonl").read_text() == samples
    _, heard = scored(source, tmp_path, data, "arc_c", "sums", fresh=True)
    assert asked_anew(heard) == 72


def test_rows_under_a_limit_are_used_again_without_it(base: Path, data: Path, tmp_path: Path) -> None:
    source = Source(model=str(base), template="none")
    few, _ = scored(source, tmp_path, data, limit=5)
    _, heard = scored(source, tmp_path, data)
    assert few.results[0].n == 5
    assert asked_anew(heard) == 7


def test_answers_of_other_weights_are_told_of_and_not_used(base: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    scored(Source(model=str(base), template="none"), tmp_path, data)
    _, heard = scored(Source(str(adapter), template="none", dtype="float32"), tmp_path, data)
    assert asked_anew(heard) == 12
    [note] = [event.text for event in heard if isinstance(event, Note)]
    assert f"also holds 12 answers of other weights ({base}); they are kept and not used" in note
    _, heard = scored(Source(model=str(base), template="none"), tmp_path, data)
    assert asked_anew(heard) == 0


@pytest.mark.parametrize(
    "changed",
    [{"template": "chat"}, {"dtype": "bfloat16"}, {"adapter": "adapter", "model": None}],
    ids=["prompt", "dtype", "adapter"],
)
def test_what_changes_an_answer_is_part_of_its_key(
    base: Path, adapter: Path, data: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    scored(Source(model=str(base), template="none"), tmp_path, data)
    changed = {key: str(adapter) if value == "adapter" else value for key, value in changed.items()}
    _, heard = scored(Source(**{"model": str(base), "template": "none", **changed}), tmp_path, data)
    assert asked_anew(heard) == 12


def test_draws_are_kept_apart_by_seed_and_sample(base: Path, data: Path, tmp_path: Path) -> None:
    source = Source(model=str(base), template="none")
    draws: dict[str, Any] = {"temperature": 1.0, "samples": 2}
    results, heard = scored(source, tmp_path, data, **draws)
    assert asked_anew(heard) == 24
    assert results.results[0].sampling == "temperature 1, 2 samples, seed 0"
    assert asked_anew(scored(source, tmp_path, data, **draws)[1]) == 0
    assert asked_anew(scored(source, tmp_path, data, **draws, seed=1)[1]) == 24
    assert asked_anew(scored(source, tmp_path, data)[1]) == 12
    texts = answers(tmp_path)
    assert any(texts[(str(base), "sums", row, 0)] != texts[(str(base), "sums", row, 1)] for row in range(12))


def test_the_harness_scores_the_same_model_and_its_base(base: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    source = Source(str(adapter), dtype="float32")
    results, _ = scored(source, tmp_path, data, "arc_c", protocol="harness", baseline=True)
    found = {(one.model, one.metric): one for one in results.results}
    assert {metric for _, metric in found} == {"acc", "acc_norm"}
    own = found[(str(adapter), "acc_norm")]
    assert (own.protocol, own.primary, own.n, own.extraction_failures) == ("harness", True, 60, None)
    assert own.difference is not None
    assert own.difference.baseline == found[(results.models[0].label, "acc_norm")].value
    # Random weights and four choices: within four standard errors of one in four.
    assert abs(own.value - 0.25) < 4 * (0.25 * 0.75 / 60) ** 0.5
    alone, _ = scored(Source(model=str(base)), tmp_path / "alone", data, "arc_c", protocol="harness")
    assert [one.value for one in alone.results] == [one.value for one in results.results if one.model == results.models[0].label]


def test_fresh_forgets_the_harness_answers(base: Path, data: Path, tmp_path: Path) -> None:
    source = Source(model=str(base))
    scored(source, tmp_path, data, "arc_c", protocol="harness", limit=4)
    [kept] = (tmp_path / "harness").glob("harness-*.jsonl")
    whole = kept.read_text()
    kept.write_text(whole + "{}\n")
    scored(source, tmp_path, data, "arc_c", protocol="harness", limit=4, fresh=True)
    assert sorted(kept.read_text().splitlines()) == sorted(whole.splitlines())


def test_an_answer_after_a_line_cut_short_is_not_lost(tmp_path: Path) -> None:
    record = dict.fromkeys(("key", "model", "fingerprint", "task", "prompt", "response", "gold", "graded"), "x")
    (tmp_path / "samples.rank1.jsonl").write_text('{"key": "cut sh')
    Journal(tmp_path, rank=1).add({**record, "score": 1.0, "prediction": None, "marked": True, "other_grader": None})
    assert list(Journal(tmp_path).read()) == ["x"]


Answerer = Callable[[Request], str]


def with_stub(monkeypatch: pytest.MonkeyPatch, base: Path, answerer: Answerer) -> None:
    """Has a function write the answers in place of the model."""

    def stub(
        speaker: Any, batches: Sequence[Sequence[Request]], decoding: Decoding, *listeners: Any
    ) -> Iterator[list[Completion]]:
        for batch in batches:
            yield [Completion(one.number, answerer(one), 5, True) for one in batch]

    monkeypatch.setattr("abba_cli.evaluation.paper.answer_batches", stub)


def test_uniform_draws_of_valid_answers_are_at_chance(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"{n}?", "output": "", "answer": f"answer{n % 4 + 1}"} for n in range(2000)]
    (tmp_path / "openbookqa").mkdir()
    (tmp_path / "openbookqa" / "test.json").write_text(json.dumps(rows))
    draw = random.Random(3)
    with_stub(monkeypatch, base, lambda request: f"the correct answer is answer{draw.randint(1, 4)}")
    results, _ = scored(Source(model=str(base), template="none"), tmp_path / "out", tmp_path, "obqa")
    [one] = results.results
    assert abs(one.value - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert one.extraction_failures == 0


def result_of(results: Results) -> TaskResult:
    [one] = results.results
    return one


def test_rows_that_ask_the_same_are_judged_by_their_own_answers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answers_in_order in (("first", ("Rome", "Bern")), ("second", ("Bern", "Rome"))):
        rows = [{"q": "Capital?", "a": answer} for answer in answers_in_order]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\ndata: {{path: {name}.jsonl}}\nprompt: '{{{{ q }}}}'\nanswer: '{{{{ a }}}}'\nmetric: exact\n"
            "pattern: '\\w+'\n"
        )
    with_stub(monkeypatch, base, lambda request: "Rome")
    tasks = [str(tmp_path / f"{name}.yaml") for name in ("first", "second")]
    results, heard = scored(Source(model=str(base), template="none"), tmp_path / "out", tmp_path, *tasks)
    assert asked_anew(heard) == 4
    assert [[one.score for one in task.examples] for task in results.results] == [[1.0, 0.0], [0.0, 1.0]]
    assert [one.value for one in results.results] == [0.5, 0.5]


def test_another_task_is_added_to_the_results_and_other_weights_replace_them(
    base: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    source = Source(str(adapter), template="none", dtype="float32")
    scored(source, tmp_path, data, "arc_c", baseline=True)
    results, _ = scored(source, tmp_path, data, "sums")
    labels = [one.label for one in results.models]
    assert [one.role for one in results.models] == ["baseline", "model"]
    assert [(one.model, one.task) for one in results.results] == [(labels[0], "arc_c"), (labels[1], "arc_c"), (labels[1], "sums")]
    again, _ = scored(source, tmp_path, data, "sums", limit=3)
    assert [one.n for one in again.results] == [60, 60, 3]
    other, _ = scored(Source(model=str(base), template="none"), tmp_path, data, "sums")
    assert [(one.model, one.task) for one in other.results] == [(str(base), "sums")]


@pytest.mark.parametrize("damage", ['{"key": 5}', '{"key": "a", "score": "x"}', "[1]", '"text"', "\x00\xff", '{"key": "cut sh'])
def test_damaged_lines_are_passed_over(base: Path, data: Path, tmp_path: Path, damage: str) -> None:
    source = Source(model=str(base), template="none")
    whole, _ = scored(source, tmp_path, data, limit=3)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    without_answer = json.dumps({key: value for key, value in json.loads(lines[0]).items() if key != "response"})
    (tmp_path / "samples.jsonl").write_text("\n".join([without_answer, damage, *lines[1:]]))
    found, heard = scored(source, tmp_path, data, limit=3)
    assert asked_anew(heard) == 1
    assert found.results == whole.results


@pytest.mark.parametrize("name", ["results.json", "samples.jsonl"])
def test_files_that_are_not_ours_are_left_alone(base: Path, data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "precious"}\n')
    said = refused(Source(model=str(base), template="none"), data, tmp_path, "arc_c")
    assert str(tmp_path / name) in said
    assert (tmp_path / name).read_text() == '{"text": "precious"}\n'
    (tmp_path / "file").touch()
    assert "is a file; expected a folder" in refused(Source(model=str(base)), data, tmp_path / "file", "arc_c")


def test_the_released_grader_and_what_it_judges_differently(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right everywhere, but half of the answers stand behind no mark, where the released code finds nothing."""
    texts = [f"The answer is: {2 * n}" if n % 2 else f"So it makes {2 * n} apples" for n in range(12)]
    with_stub(monkeypatch, base, lambda request: texts[request.number])
    source = Source(model=str(base), template="none")
    ours = result_of(scored(source, tmp_path, data)[0])
    assert (ours.value, ours.unmarked, ours.disagreements, ours.grader) == (1.0, 6, 6, "abba")
    theirs = result_of(scored(source, tmp_path, data, grader="released")[0])
    assert (theirs.value, theirs.disagreements, theirs.grader) == (0.5, 6, "released")


def test_programs_are_run_and_counted_per_sample(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["    return x + x\n" if sample < 3 else "    return 5\n" for sample in range(10)]
    with_stub(monkeypatch, base, lambda request: texts[request.number])
    source = Source(model=str(base), template="none")
    run: dict[str, Any] = {"temperature": 0.8, "samples": 10, "allow_code_execution": True}
    results, _ = scored(source, tmp_path, data, "humaneval", **run)
    assert [(one.metric, one.value, one.primary) for one in results.results] == [("pass@1", 0.3, True), ("pass@10", 1.0, False)]


def refused(source: Source, data: Path | None, output: Path, *tasks: str, **options: Any) -> str:
    with pytest.raises((DataError, ModelError, RunError)) as caught:
        evaluate(source, EvaluationOptions(tasks, data_dir=data, output=output, **options))
    return str(caught.value)


def test_what_is_refused_before_a_model_is_loaded(data: Path, tmp_path: Path) -> None:
    gone = Source(model=str(tmp_path / "no-such-model"))
    assert "there is no task arc_x; did you mean arc_" in refused(gone, data, tmp_path, "arc_x")
    assert "humaneval runs programs that the model has written; give --allow-code-execution" in refused(
        gone, data, tmp_path, "humaneval"
    )
    assert "--samples above 1 needs draws" in refused(gone, data, tmp_path, "arc_c", samples=2)
    assert "Put the file at DIR/boolq/test.jsonl" in refused(gone, data, tmp_path, "boolq")
    assert "no-such-model" in refused(gone, data, tmp_path, "arc_c")


def test_no_run_and_no_chat_template(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(Source(), data, tmp_path / "out", "arc_c")
    assert said == (
        "no model is named, and there is no folder out/ here; train with `abba train RECIPE`, or name one with --adapter or "
        "--model"
    )
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    said = refused(Source(model=str(bare), template="chat"), data, tmp_path / "x", "arc_c")
    assert "the tokenizer has no chat template" in said
    assert load_for_generation(Source(model=str(bare)))[0].template.name == "none"
