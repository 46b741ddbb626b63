"""Scores through the harness: the same as its own, at chance where nothing was learnt, and never computed twice."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_rows import arc_rows, gsm8k_rows, load_speaker, settings, write_rows, write_tokenizer
from models import write_adapter, write_model
from peft import PeftModel

pytest.importorskip("lm_eval")

from abba_cli.errors import DataError, ModelError
from abba_cli.evaluation.harness import model as harness_model
from abba_cli.evaluation.harness.scoring import HarnessScore, score_with_harness
from abba_cli.events import Event, Note, Stage
from abba_cli.speakers import Speaker

ROWS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "llama", write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "ARC-Challenge", "test", arc_rows(ROWS))
    write_rows(folder / "gsm8k", "test", gsm8k_rows(4))
    write_rows(folder / "gsm8k", "train", gsm8k_rows(9, seed=1))
    return folder


@pytest.fixture(scope="module")
def speaker(model: Path) -> Speaker:
    return load_speaker(model)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every answer that is computed while a test runs."""
    seen: list[Any] = []
    keep = harness_model.AskedModel._keep

    def counting(self: Any, kind: str, arguments: Any, answer: Any) -> None:
        seen.append((kind, arguments))
        keep(self, kind, arguments, answer)

    monkeypatch.setattr(harness_model.AskedModel, "_keep", counting)
    return seen


def by_metric(scores: list[HarnessScore], task: str) -> dict[str, HarnessScore]:
    return {score.metric: score for score in scores if score.task == task}


def test_numbers_are_those_of_the_harness_itself(speaker: Speaker, data: Path, tmp_path: Path) -> None:
    """simple_evaluate on the same model, with the same rows given to it in its own way: a task as a dictionary."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks = Path(lm_eval.__file__).parent / "tasks"
    configs = []
    for file, folder in (("arc/arc_challenge.yaml", "ARC-Challenge"), ("gsm8k/gsm8k.yaml", "gsm8k")):
        files = {split.stem: str(split) for split in (data / folder).iterdir()}
        files.setdefault("train", files["test"])
        files |= {"validation": files["test"]}
        rows = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        configs.append(load_yaml(tasks / file, resolve_func=True) | rows)
    # Its constructor ties the weights of the model that it is given.
    own = HFLM(copy.deepcopy(speaker.model), tokenizer=speaker.template.tokenizer, batch_size=4)
    theirs = lm_eval.simple_evaluate(own, tasks=configs, task_manager=TaskManager(include_defaults=False), bootstrap_iters=10)
    assert theirs is not None

    scores = score_with_harness(speaker, ["arc_c", "gsm8k"], **settings(tmp_path, data, shots=None))

    expected = {}
    for task, name in (("arc_c", "arc_challenge"), ("gsm8k", "gsm8k")):
        for key, value in theirs["results"][name].items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr"):
                error = theirs["results"][name][f"{metric}_stderr,{filtered}"]
                expected[task, metric if filtered == "none" else key] = (value, error, theirs["n-shot"][name])
    found = {(score.task, score.metric): (score.value, score.stderr, score.shots) for score in scores}
    assert found == expected
    assert 0 < expected["arc_c", "acc"][0] < 1, "numbers at an end show little"
    theirs_by_doc = {
        sample["doc_id"]: sample["acc_norm"] for sample in theirs["samples"]["arc_challenge"] if sample["filter"] == "none"
    }
    assert by_metric(scores, "arc_c")["acc_norm"].scores == theirs_by_doc


def test_primary_metrics_counts_and_examples(speaker: Speaker, data: Path, tmp_path: Path) -> None:
    scores = score_with_harness(speaker, ["arc_c", "gsm8k"], **settings(tmp_path, data))
    assert [(score.task, score.metric) for score in scores if score.primary] == [
        ("arc_c", "acc_norm"),
        ("gsm8k", "exact_match,strict-match"),
    ]
    choice, maths = scores[1], by_metric(scores, "gsm8k")["exact_match,strict-match"]
    assert (choice.n, choice.shots, choice.extraction_failures) == (ROWS, 0, None)
    assert choice.data == str(data / "ARC-Challenge" / "test.jsonl")
    assert choice.value == pytest.approx(sum((choice.scores or {}).values()) / ROWS)
    rows = arc_rows(ROWS)
    for row, example in zip(rows, choice.examples, strict=False):
        right = row["choices"]["text"]["ABCD".index(row["answerKey"])]
        assert example.prompt == f"Question: {row['question']}\nAnswer:"
        assert (example.gold, example.score) == (right, float(example.response == right))
    # A model of random weights never writes "#### 7".
    assert (maths.n, maths.extraction_failures, maths.value) == (4, 4, 0.0)
    assert maths.examples[0].prediction is None
    assert maths.examples[0].response
    assert maths.examples[0].gold == gsm8k_rows(1)[0]["answer"]


def test_a_model_of_random_weights_is_at_chance(speaker: Speaker, tmp_path: Path) -> None:
    """200 rows of four choices: 99.9% of guesses at random are within 3.3 standard errors of a quarter."""
    write_rows(tmp_path / "ARC-Easy", "test", arc_rows(200, seed=5))
    for score in score_with_harness(speaker, ["arc_e"], **settings(tmp_path / "cache", tmp_path, batch_size=32)):
        assert abs(score.value - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 200), score.metric
        assert score.n == 200


def test_the_same_again_computes_nothing_and_another_model_all(
    speaker: Speaker, data: Path, tmp_path: Path, asked: list[Any]
) -> None:
    first = score_with_harness(speaker, ["arc_c", "gsm8k"], **settings(tmp_path, data))
    computed = len(asked)
    different = {(row["question"], text) for row in arc_rows(ROWS) for text in row["choices"]["text"]}
    assert computed == len(different) + 4
    asked.clear()
    assert score_with_harness(speaker, ["arc_c", "gsm8k"], **settings(tmp_path, data)) == first
    assert not asked
    score_with_harness(speaker, ["arc_c", "gsm8k"], **settings(tmp_path, data, fingerprint="f01"))
    assert len(asked) == computed
    asked.clear()
    # The prompts of other settings are others.
    more = score_with_harness(speaker, ["gsm8k"], **settings(tmp_path, data, shots=2, limit=3))
    assert len(asked) == 3
    assert more[0].shots == 2
    assert more[0].prompt_hash != by_metric(first, "gsm8k")[more[0].metric].prompt_hash


def test_another_tokenizer_is_another_model(speaker: Speaker, data: Path, tmp_path: Path, asked: list[Any]) -> None:
    score_with_harness(speaker, ["arc_c"], **settings(tmp_path, data, limit=4))
    asked.clear()
    other = copy.deepcopy(speaker)
    other.template.tokenizer.add_special_tokens({"bos_token": "<|eos|>"})
    score_with_harness(other, ["arc_c"], **settings(tmp_path, data, limit=4))
    assert len(asked) == 16


def test_the_adapter_off_is_the_base_and_nothing_is_changed(model: Path, speaker: Speaker, data: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", model)
    tuned = PeftModel.from_pretrained(load_speaker(model).model, str(adapter)).train()
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}

    def score(off: bool) -> list[HarnessScore]:
        given = settings(tmp_path / f"cache-{off}", data)
        return score_with_harness(Speaker("tuned", tuned, speaker.template, adapter_off=off), ["arc_c"], **given)

    plain = score_with_harness(speaker, ["arc_c"], **settings(tmp_path / "cache", data))
    assert score(off=True) == plain
    assert score(off=False) != plain
    assert tuned.training
    after = tuned.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_out_of_memory_halves_the_batch(
    speaker: Speaker, data: Path, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score_with_harness(speaker, ["arc_c"], **settings(tmp_path / "one", data, batch_size=3))
    asked.clear()
    forward = speaker.model.forward

    def small(input_ids: torch.Tensor, **rest: Any) -> Any:
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids, **rest)

    monkeypatch.setattr(speaker.model, "forward", small)
    found = score_with_harness(speaker, ["arc_c"], **settings(tmp_path / "two", data, batch_size="auto"))
    assert [score.value for score in found] == [score.value for score in expected]
    assert len(asked) == len({(str(arguments)) for _, arguments in asked}), "answers that were there are not computed again"


def test_what_is_told_and_what_is_printed(
    speaker: Speaker, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    score_with_harness(speaker, ["arc_c", "gsm8k"], **settings(tmp_path, data, notify=events.append, limit=2))
    stages = [event for event in events if isinstance(event, Stage)]
    assert stages[0] == Stage("arc_c: reading")
    assert Stage("arc_c: asking", 8, 8) in stages
    assert Stage("gsm8k: asking", 2, 2) in stages
    assert not any(isinstance(event, Note) for event in events)
    assert capsys.readouterr() == ("", "")


def test_prompts_that_do_not_fit_are_told_of(tmp_path: Path, model: Path, data: Path) -> None:
    short = load_speaker(write_model(tmp_path / "short", model, max_position_embeddings=24))
    events: list[Event] = []
    score_with_harness(short, ["arc_c"], **settings(tmp_path / "cache", data, notify=events.append, limit=2))
    assert [event.text for event in events if isinstance(event, Note)] == [
        "arc_c: prompts that are longer than the model's 24 positions lose their start"
    ]
    with pytest.raises(ModelError, match=r"task gsm8k: requested max tokens to generate \(256\) must be less than .* \(24\)"):
        score_with_harness(short, ["gsm8k"], **settings(tmp_path / "cache", data))


def test_chat_template(speaker: Speaker, data: Path, tmp_path: Path) -> None:
    chatting = copy.deepcopy(speaker)
    chatting.template.tokenizer.chat_template = "{% for m in messages %}<|bos|>{{ m.role }}: {{ m.content }}{% endfor %}"
    given = settings(tmp_path, data, chat_template=True, limit=2)
    score = score_with_harness(chatting, ["gsm8k"], **given)[0]
    assert score.examples[0].prompt.startswith("<|bos|>user: Question: ")
    chatting.template.tokenizer.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        score_with_harness(chatting, ["gsm8k"], **given)
