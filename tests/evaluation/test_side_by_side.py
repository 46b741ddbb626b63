"""Comparisons of any size, on terminals of any width and as pictures."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import drawn_comparison
from matplotlib.image import imread

from abba_cli.errors import RunError
from abba_cli.evaluation.reporting.chart import comparison_png
from abba_cli.evaluation.reporting.comparing import Cell, Column, Comparison, Row
from abba_cli.evaluation.reporting.tables import TASK_ORDER


def made(models: int, tasks: tuple[str, ...], name: str = "model {}") -> Comparison:
    """A comparison of any size; the last model is the best at everything."""
    columns = tuple(Column(task, task, "paper", True, False, ()) for task in tasks)
    rows = []
    for i in range(models):
        value = 0.8 * (i + 1) / models
        rows.append(Row(name.format(i), "model", tuple(Cell(value, 0.0123, (value - 0.02, value + 0.02), 10_042) for _ in tasks)))
    return Comparison(columns, tuple(rows), tuple(frozenset({models - 1}) for _ in tasks), ())


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 20),
    st.integers(1, len(TASK_ORDER)),
    st.sampled_from(["m{}", "SmolLM2-135M-Instruct + out/run-{}"]),
    st.integers(80, 200),
)
def test_any_comparison_fits_with_all_its_numbers(models: int, tasks: int, name: str, width: int) -> None:
    comparison = made(models, TASK_ORDER[:tasks], name)
    text = drawn_comparison(comparison, width)
    words = text.replace("*", " ").split()
    for i, row in enumerate(comparison.rows):
        assert row.label in " ".join(words)
        # "10,042" and the labels hold no such number.
        assert sum(word == f"{80 * (i + 1) / models:.2f}" for word in words) == tasks
    table = text[: text.index("Scores in percent")]
    assert table.count("*") == tasks


@pytest.mark.parametrize("width", range(80, 100))
def test_many_models_are_cut_into_tables_that_fit(width: int) -> None:
    text = drawn_comparison(made(20, TASK_ORDER[:15]), width)
    assert text.count("humaneval_plus") > 1


@pytest.mark.parametrize(("models", "tasks"), [(1, 1), (8, 15), (2, 8)])
def test_the_picture_grows_with_what_it_shows(tmp_path: Path, models: int, tasks: int) -> None:
    file = tmp_path / "chart.png"
    comparison_png(made(models, TASK_ORDER[:tasks], "_model $x_{}$ \N{HIRAGANA LETTER A}"), file)
    height, width, _ = imread(file).shape
    assert width == 1350
    assert height > 150 * 0.11 * models * tasks
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


def test_every_model_has_its_colour_in_the_picture(tmp_path: Path) -> None:
    comparison_png(made(3, TASK_ORDER[:4]), tmp_path / "chart.png")
    pixels = imread(tmp_path / "chart.png")[150:, :, :3]  # below the legend
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)):
        assert (abs(pixels - [part / 255 for part in colour]).max(axis=-1) < 0.01).sum() > 4 * 20
    assert not (abs(pixels - [0xCC / 255, 0x79 / 255, 0xA7 / 255]).max(axis=-1) < 0.01).any()


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to .*chart\.png"):
        comparison_png(made(1, TASK_ORDER[:1]), tmp_path / "file" / "chart.png")
