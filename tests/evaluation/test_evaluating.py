"""A model scored end to end: real tiny models, real files, the answers against transformers' own, and what is used again."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluated import answers, asked_anew, refused, scored
from transformers import AutoModelForCausalLM, AutoTokenizer

from abba_cli.evaluation.journal import Journal
from abba_cli.events import Note
from abba_cli.merging import merge
from abba_cli.speakers import Source, load_for_generation


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
