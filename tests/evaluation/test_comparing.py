"""Evaluations side by side: what is best, what cannot be compared, and how it looks."""

from pathlib import Path

import pytest
from made_results import PARSER, beside, cells_of, drawn_comparison, evaluation, model, scored, written

from abba_cli.errors import DataError
from abba_cli.evaluation.reporting.chart import comparison_png
from abba_cli.evaluation.reporting.comparing import Comparison, compare
from abba_cli.evaluation.reporting.side_by_side import comparison_markdown
from abba_cli.evaluation.reporting.tables import COMMONSENSE
from abba_cli.evaluation.results import Results, TaskResult

BASELINE = model("base", role="baseline", fingerprint="untouched")


def labels(comparison: Comparison) -> list[str]:
    return [row.label for row in comparison.rows]


def values(comparison: Comparison, label: str) -> dict[str, float]:
    row = next(row for row in comparison.rows if row.label == label)
    return {column.heading: cell.value for column, cell in zip(comparison.columns, row.cells, strict=True) if cell is not None}


def best(comparison: Comparison) -> dict[str, set[str]]:
    return {
        column.heading: {comparison.rows[i].label for i in found}
        for column, found in zip(comparison.columns, comparison.best, strict=True)
    }


@pytest.fixture
def two(tmp_path: Path) -> Comparison:
    written(tmp_path / "a", evaluation(scored("boolq", 0.6, "A"), scored("obqa", 0.5, "A"), scored("mine", 0.1, "A")))
    written(tmp_path / "b" / "eval", evaluation(scored("obqa", 0.5, "B"), scored("boolq", 0.7, "B"), scored("gsm8k", 0.2, "B")))
    return compare([tmp_path / "a" / "results.json", tmp_path / "b"])


def test_columns_rows_and_the_best(two: Comparison) -> None:
    assert [column.heading for column in two.columns] == ["obqa", "boolq", "gsm8k", "mine"]
    assert labels(two) == ["A", "B"]
    assert values(two, "A") == {"obqa": 0.5, "boolq": 0.6, "mine": 0.1}
    assert values(two, "B") == {"obqa": 0.5, "boolq": 0.7, "gsm8k": 0.2}
    # A tie has two best; who is alone is not the best of anything.
    assert best(two) == {"obqa": {"A", "B"}, "boolq": {"B"}, "gsm8k": set(), "mine": set()}
    assert two.notes == ()


def test_as_markdown(two: Comparison) -> None:
    text = comparison_markdown(two)
    assert cells_of(text) == [
        ["model", "obqa", "boolq", "gsm8k", "mine"],
        ["A", "50.00 ± 2.00", "60.00 ± 2.00", "-", "10.00 ± 2.00"],
        ["B", "50.00 ± 2.00", "70.00 ± 2.00", "20.00 ± 2.00", "-"],
        ["n", "500", "500", "500", "500"],
    ]
    assert text.count("**50.00** ±") == 2
    assert text.count("**") == 2 * 3
    assert "<li>" in PARSER.render(text)


def test_as_a_table(two: Comparison) -> None:
    lines = drawn_comparison(two, 80).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["obqa", "boolq", "gsm8k", "mine"],
        ["n", "500", "500", "500", "500"],
        ["A", "50.00*+/-", "2.00", "60.00", "+/-", "2.00", "-", "10.00", "+/-", "2.00"],
        ["B", "50.00*+/-", "2.00", "70.00*+/-", "2.00", "20.00", "+/-", "2.00", "-"],
    ]


@pytest.mark.parametrize(
    ("field", "changed", "reason"),
    [
        ("n", 100, "different n (500: A; 100: B)"),
        ("shots", 5, "different shots (0: A; 5: B)"),
        ("sampling", "temperature 0.1", "different sampling (greedy: A; temperature 0.1: B)"),
        ("grader", "released", "different grader (abba: A; released: B)"),
        ("metric", "pass@1", "different metric (accuracy: A; pass@1: B)"),
        ("prompt_hash", "0123456789", "different prompts, by their hash (hash-of-: A; 01234567: B)"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, field: str, changed: object, reason: str) -> None:
    written(tmp_path / "a", evaluation(scored("boolq", 0.6, "A"), scored("piqa", 0.6, "A")))
    written(tmp_path / "b", evaluation(scored("boolq", 0.7, "B", **{field: changed}), scored("piqa", 0.7, "B")))
    comparison = compare([tmp_path / "a", tmp_path / "b"])
    assert best(comparison) == {"piqa": {"B"}, "boolq": set()}
    assert [column.reasons for column in comparison.columns] == [(), (reason,)]
    assert comparison.notes == (f"(!) boolq: not comparable, so no best is marked; {reason}",)
    for text in (comparison_markdown(comparison), drawn_comparison(comparison, 120)):
        assert "boolq (!)" in text
        assert "piqa (!)" not in text
        assert "not comparable" in text


def test_other_templates_are_named_rather_than_hashes(tmp_path: Path) -> None:
    for name, template in (("A", "alpaca"), ("B", "chat")):
        tasks = [scored(task, 0.5, name, prompt_hash=f"{template} {task}") for task in ("boolq", "piqa")]
        written(tmp_path / name, evaluation(*tasks, models=(model(name, template=template),)))
    (note,) = compare([tmp_path / "A", tmp_path / "B"]).notes
    assert note == ("(!) piqa, boolq: not comparable, so no best is marked; different prompt template (alpaca: A; chat: B)")


def test_protocols_never_share_a_column(tmp_path: Path) -> None:
    written(tmp_path / "a", evaluation(scored("boolq", 0.6, "A"), scored("obqa", 0.1, "A")))
    written(tmp_path / "b", evaluation(scored("boolq", 0.7, "B", protocol="harness", metric="acc")))
    comparison = compare([tmp_path / "a", tmp_path / "b"])
    assert [column.heading for column in comparison.columns] == ["obqa (paper)", "boolq (paper)", "boolq (harness)"]
    assert set().union(*best(comparison).values()) == set()
    assert "the protocols paper and harness ask and judge differently" in comparison.notes[0]


def tuned(name: str, value: float, base: float = 0.4, baseline: object = BASELINE, **fields: object) -> Results:
    """A run with its baseline, on two tasks."""
    tasks = [scored(task, value, name, difference=beside(base, value), **fields) for task in ("boolq", "piqa")]
    bases = [scored(task, base, "base", **fields) for task in ("boolq", "piqa")]
    return evaluation(*tasks, *bases, models=(model(name), baseline))  # type: ignore[arg-type]


def test_a_shared_baseline_is_shown_once(tmp_path: Path) -> None:
    sources = [written(tmp_path / name, tuned(name, value)) for name, value in (("A", 0.5), ("B", 0.6))]
    comparison = compare(sources)
    assert labels(comparison) == ["A", "base", "B"]
    assert values(comparison, "base") == {"boolq": 0.4, "piqa": 0.4}
    assert comparison.notes == ()


def test_the_base_scored_as_itself_is_the_same_model(tmp_path: Path) -> None:
    alone = evaluation(
        scored("boolq", 0.4, "the base"), scored("obqa", 0.3, "the base"), models=(model("the base", fingerprint="untouched"),)
    )
    comparison = compare([written(tmp_path / "alone", alone), written(tmp_path / "A", tuned("A", 0.5))])
    assert labels(comparison) == ["the base", "A"]
    assert values(comparison, "the base") == {"boolq": 0.4, "piqa": 0.4, "obqa": 0.3}


@pytest.mark.parametrize("fields", [{"n": 100}, {"prompt_hash": "other"}, {"sampling": "temperature 1"}])
def test_a_baseline_that_was_asked_otherwise_has_its_own_row(tmp_path: Path, fields: dict[str, object]) -> None:
    comparison = compare([written(tmp_path / "A", tuned("A", 0.5)), written(tmp_path / "B", tuned("B", 0.6, **fields))])
    assert labels(comparison) == ["A", "base (A)", "B", "base (B)"]


def test_baselines_with_other_weights_have_their_own_rows(tmp_path: Path) -> None:
    other = model("base", role="baseline", fingerprint="in bfloat16")
    comparison = compare([written(tmp_path / "A", tuned("A", 0.5)), written(tmp_path / "B", tuned("B", 0.6, baseline=other))])
    assert labels(comparison) == ["A", "base (A)", "B", "base (B)"]


def test_a_baseline_under_another_template_has_its_own_row(tmp_path: Path) -> None:
    """Even where no task shows it: a row must not mix the two."""
    for name, template, task in (("A", "alpaca", "boolq"), ("B", "chat", "piqa")):
        baseline = model("base", role="baseline", fingerprint="untouched", template=template)
        written(tmp_path / name, evaluation(scored(task, 0.4, "base"), models=(baseline,)))
    assert labels(compare([tmp_path / "A", tmp_path / "B"])) == ["base (A)", "base (B)"]


def test_a_baseline_that_came_out_otherwise_is_told_of(tmp_path: Path) -> None:
    comparison = compare([written(tmp_path / "A", tuned("A", 0.5)), written(tmp_path / "B", tuned("B", 0.6, base=0.41))])
    assert labels(comparison) == ["A", "base", "B"]
    assert values(comparison, "base")["piqa"] == 0.4
    assert set(comparison.notes) == {
        f"base, {task}: 40.00 in A is shown; the same prompts gave 41.00 in B" for task in ("boolq", "piqa")
    }


def test_equal_labels_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    sources = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z"]
    for source, value in zip(sources, (0.1, 0.2, 0.3), strict=True):
        written(source / "eval", evaluation(scored("boolq", value), models=(model(fingerprint=str(value)),)))
    assert labels(compare(sources[1:])) == ["tuned (run)", "tuned (z)"]
    comparison = compare(sources)
    assert labels(comparison)[:2] == ["tuned (x/run)", "tuned (y/run)"]
    assert [row.cells[0].value for row in comparison.rows if row.cells[0]] == [0.1, 0.2, 0.3]
    # The same source twice is one model; the folder and its file are the same source.
    assert labels(compare([sources[0], sources[0] / "eval" / "results.json", sources[0] / "eval"])) == ["tuned"]


def test_equal_labels_in_one_folder_are_numbered(tmp_path: Path) -> None:
    written(tmp_path, evaluation(scored("boolq", 0.1)))
    (tmp_path / "results.json").rename(tmp_path / "older.json")
    written(tmp_path, evaluation(scored("boolq", 0.2)))
    comparison = compare([tmp_path / "results.json", tmp_path / "older.json"])
    assert labels(comparison) == [f"tuned ({tmp_path.name}) #1", f"tuned ({tmp_path.name}) #2"]


def eight(name: str, value: float, **fields: object) -> list[TaskResult]:
    return [scored(task, value, name, **fields) for task in COMMONSENSE]


def test_the_average_stands_behind_the_eight(tmp_path: Path) -> None:
    written(tmp_path / "a", evaluation(*eight("A", 0.5), scored("gsm8k", 0.1, "A")))
    written(tmp_path / "b", evaluation(*eight("B", 0.6)))
    written(tmp_path / "c", evaluation(*eight("C", 0.9)[1:]))
    comparison = compare([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert [column.heading for column in comparison.columns] == [*COMMONSENSE, "average", "gsm8k"]
    averages = [row.cells[8] for row in comparison.rows]
    assert [None if cell is None else round(cell.value, 12) for cell in averages] == [0.5, 0.6, None]
    assert averages[0] is not None
    assert averages[0].stderr == pytest.approx(0.02 / 8**0.5)
    assert averages[0].interval == pytest.approx((0.5 - 1.959964 * 0.02 / 8**0.5, 0.5 + 1.959964 * 0.02 / 8**0.5))
    assert best(comparison)["average"] == {"B"}
    assert best(comparison)["piqa"] == {"C"}
    assert comparison.notes == ("average: mean of the 8 commonsense tasks, each counting alike, as in the paper",)


def test_an_average_of_what_cannot_be_compared_has_no_best(tmp_path: Path) -> None:
    written(tmp_path / "a", evaluation(*eight("A", 0.5)))
    written(tmp_path / "b", evaluation(*eight("B", 0.6)[:-1], scored("boolq", 0.6, "B", n=9)))
    written(tmp_path / "c", evaluation(scored("boolq", 0.9, "C", n=9)))
    assert best(compare([tmp_path / "a", tmp_path / "b"]))["average"] == set()
    assert (
        "(!) average: not comparable, so no best is marked; its tasks are not (boolq)"
        in compare([tmp_path / "a", tmp_path / "b"]).notes
    )
    # A model that has no average does not spoil it.
    written(tmp_path / "b", evaluation(*eight("B", 0.6)))
    assert best(compare([tmp_path / "a", tmp_path / "b", tmp_path / "c"]))["average"] == {"B"}


def test_where_less_is_better(tmp_path: Path) -> None:
    for name, value in (("A", 20.0), ("B", 12.5)):
        fields = {"protocol": "harness", "metric": "word_perplexity", "stderr": None, "interval": None}
        written(tmp_path / name, evaluation(scored("wikitext", value, name, **fields)))
    comparison = compare([tmp_path / "A", tmp_path / "B"])
    assert best(comparison) == {"wikitext": {"B"}}
    assert cells_of(comparison_markdown(comparison))[1:3] == [["A", "20"], ["B", "12.5"]]
    with pytest.raises(DataError, match="no score is a share of 1"):
        comparison_png(comparison, tmp_path / "chart.png")


def test_no_scores(tmp_path: Path) -> None:
    written(tmp_path, evaluation(models=(model(),)))
    with pytest.raises(DataError, match="no task has a score; run `abba eval` to the end first"):
        compare([tmp_path])
