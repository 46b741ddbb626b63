"""Tables read back: cell by cell from Markdown with another program's parser, and line by line from a terminal."""

import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import beside, cells_of, evaluation, model, scored
from rich.console import Console

from abba_cli.evaluation.reporting.tables import (
    COMMONSENSE,
    TASK_ORDER,
    commonsense_average,
    escape_markdown,
    markdown_row,
    results_markdown,
    results_table,
)
from abba_cli.evaluation.results import Results

BASELINE = model("base", role="baseline")


def drawn(results: Results, width: int = 80) -> list[str]:
    """The table's lines, as a terminal shows them; none may be cut or leave the terminal."""
    console = Console(file=io.StringIO(), width=width)
    console.print(results_table(results))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    return [line.rstrip() for line in lines]


def all_tasks(**fields: object) -> Results:
    """All fifteen tasks, in another order than the paper's, with the widest numbers there are."""
    tasks = [
        scored(task, 0.9, n=10_042, metric="pass@1" if i >= 11 else "accuracy", difference=beside(0.1, 0.9, 1e-9), **fields)
        for i, task in enumerate(TASK_ORDER)
    ]
    return evaluation(*reversed(tasks), models=(model(), BASELINE))


def test_every_number_of_a_row() -> None:
    results = evaluation(
        scored("boolq", 0.6596, n=3270, stderr=0.00829, difference=beside(0.6012, 0.6596, 0.01234)),
        scored("obqa", 0.5, stderr=None, difference=beside(0.6, 0.5, 0.0009999)),
        scored("my_task", 1.0, n=7, stderr=math.nan),
        models=(model(), BASELINE),
    )
    expected = [
        ["task", "protocol", "n", "score", "+/-", "baseline", "change", "p"],
        ["obqa", "paper", "500", "50.00", "-", "60.00", "-10.00", "<0.001"],
        ["boolq", "paper", "3,270", "65.96", "0.83", "60.12", "+5.84", "0.012"],
        ["my_task", "paper", "7", "100.00", "-", "-", "-", "-"],
    ]
    assert cells_of(results_markdown(results)) == expected
    title, *lines = drawn(results)
    assert title == "tuned"
    assert [line.split() for line in lines] == expected


@pytest.mark.parametrize("width", [80, 120])
def test_all_tasks_fit_a_terminal(width: int) -> None:
    lines = drawn(all_tasks(), width)
    assert [line.split()[0] for line in lines[2:]] == [*COMMONSENSE, "average", *TASK_ORDER[8:]]
    assert all(line.endswith("<0.001") for line in lines[2:] if not line.startswith("average"))
    assert len(lines) == 2 + 16


def test_without_a_baseline_there_are_no_empty_columns() -> None:
    results = evaluation(scored("boolq", 0.5))
    assert cells_of(results_markdown(results))[0] == ["task", "protocol", "n", "score", "+/-"]
    assert drawn(results)[1].split() == ["task", "protocol", "n", "score", "+/-"]


def test_long_names_of_the_harness_break_at_underscores() -> None:
    name = "mmlu_high_school_computer_science"
    fields = {"protocol": "harness", "metric": "acc_norm", "grader": "harness", "difference": beside(0.1, 0.9)}
    results = evaluation(scored(name, 0.9, n=10_042, **fields), models=(model(), BASELINE))
    lines = drawn(results)
    first = [line.split()[0] for line in lines[2:]]
    assert "".join(first) == name
    assert all(part.endswith("_") for part in first[:-1])
    assert lines[2].split()[1:] == ["harness", "10,042", "90.00", "2.00", "10.00", "+80.00", "0.012"]
    assert lines[3].split()[1:] == ["acc_norm"]
    assert cells_of(results_markdown(results))[1][:2] == [name, "harness acc_norm"]


def test_the_average_is_the_mean_of_the_eight() -> None:
    values = [0.7506, 0.6459, 0.7974, 0.7603, 0.8250, 0.8041, 0.7508, 0.6680]  # the paper's: average 75.03
    tasks = [
        scored(task, value, stderr=0.01 * (i + 1), difference=beside(0.5, value))
        for i, (task, value) in enumerate(zip(COMMONSENSE, values, strict=True))
    ]
    (average,) = commonsense_average(tasks)
    assert round(100 * average.value, 2) == 75.03
    assert average.stderr == pytest.approx(0.01 * math.sqrt(204) / 8)  # 1 + 4 + ... + 64 = 204
    assert average.baseline == 0.5
    row = cells_of(results_markdown(evaluation(*tasks, models=(model(), BASELINE))))[9]
    assert row == ["average of 8", "paper", "", "75.03", "1.79", "50.00", "+25.03", "-"]


@pytest.mark.parametrize("missing", COMMONSENSE)
def test_seven_of_eight_have_no_average(missing: str) -> None:
    tasks = [scored(task, 0.5) for task in COMMONSENSE if task != missing]
    assert commonsense_average(tasks) == []
    # The eighth under the other protocol does not complete them.
    results = evaluation(*tasks, scored(missing, 0.5, protocol="harness"))
    assert "average" not in results_markdown(results)


def test_protocols_have_averages_of_their_own() -> None:
    both = [
        scored(task, value, protocol=protocol) for protocol, value in (("harness", 0.25), ("paper", 0.75)) for task in COMMONSENSE
    ]
    rows = cells_of(results_markdown(evaluation(*both)))[1:]
    assert [row[:2] + row[3:4] for row in rows if row[0].startswith("average")] == [
        ["average of 8", "paper", "75.00"],
        ["average of 8", "harness", "25.00"],
    ]
    assert [row[1] for row in rows] == ["paper"] * 9 + ["harness"] * 9


def test_one_task_without_an_error_leaves_the_average_without() -> None:
    tasks = [scored(task, 0.5, stderr=None if task == "piqa" else 0.01) for task in COMMONSENSE]
    assert cells_of(results_markdown(evaluation(*tasks)))[9] == ["average of 8", "paper", "", "50.00", "-"]


def test_numbers_that_are_no_shares_stay_as_they_are() -> None:
    results = evaluation(
        scored("wikitext", 0.83, metric="bits_per_byte", protocol="harness", stderr=None),
        scored("other", 23.456, metric="bleu", protocol="harness", stderr=1.5),
    )
    assert [row[3:] for row in cells_of(results_markdown(results))[1:]] == [["0.83", "-"], ["23.46", "1.5"]]


def test_secondary_metrics_and_the_baselines_own_rows_stay_out() -> None:
    results = evaluation(
        scored("boolq", 0.5, difference=beside(0.4, 0.5)),
        scored("boolq", 0.9, metric="pass@10", primary=False),
        scored("boolq", 0.4, model="base"),
        models=(model(), BASELINE),
    )
    assert [row[3] for row in cells_of(results_markdown(results))] == ["score", "50.00"]


def test_a_baseline_without_pairs_is_shown_without_a_test() -> None:
    results = evaluation(scored("boolq", 0.5), scored("boolq", 0.4, model="base"), models=(model(), BASELINE))
    assert cells_of(results_markdown(results)) == [
        ["task", "protocol", "n", "score", "+/-", "baseline"],
        ["boolq", "paper", "500", "50.00", "2.00", "40.00"],
    ]


def test_several_models_have_headings() -> None:
    results = evaluation(scored("boolq", 0.5), scored("boolq", 0.75, model="[other]"))
    assert [row[0] for row in cells_of(results_markdown(results))[1:]] == ["tuned", "boolq", "[other]", "boolq"]
    assert [line.split()[0] for line in drawn(results)[1:]] == ["tuned", "boolq", "[other]", "boolq"]


def test_only_a_baseline() -> None:
    results = evaluation(scored("boolq", 0.5, model="base"), models=(BASELINE,))
    assert cells_of(results_markdown(results))[1] == ["boolq", "paper", "500", "50.00", "2.00"]


def test_the_caption_says_how_the_numbers_came_about() -> None:
    results = evaluation(
        scored(
            "boolq", 0.5, shots=5, sampling="temperature 0.1", grader="released", unreadable_rows=2, difference=beside(0.4, 0.5)
        ),
        models=(model(template="chat"), BASELINE),
    )
    caption = results_markdown(results).split("\n\n")[1]
    for part in (
        "abba 1.2.3 on 2026-11-22",
        "protocol: paper",
        "answers: temperature 0.1",
        "prompt template: chat",
        "worked examples: 5",
        "graded by the rules of: released",
        "McNemar exact",
        "2 rows of the data could not be read",
    ):
        assert part in caption
    assert "could not be read" not in results_markdown(evaluation(scored("boolq", 0.5)))


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" _*`|\\<>&[]~"), min_size=1))
def test_any_text_survives_a_markdown_cell(text: str) -> None:
    table = "\n".join([markdown_row(["a", "b"]), "| --- | --- |", markdown_row([escape_markdown(text), "end"])])
    assert cells_of(table)[1] == [" ".join(text.split()), "end"]
