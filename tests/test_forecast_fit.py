"""What fits into a memory budget, and how `abba train --fit` answers."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from abba_cli import load_recipe
from abba_cli.cli import main
from abba_cli.forecast.budget import parse_budget
from abba_cli.forecast.fitting import Fit, changed, largest_that_fits
from abba_cli.forecast.prediction import RUNTIME_BYTES, Forecast
from abba_cli.preparation import prepare
from abba_cli.ui.forecast import memory_bar

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("800MB", 8 * 10**8), (" 1.5 gb ", 15 * 10**8)]
)
def test_budget(text: str, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["24 apples", "24", "GB", "-3GB", "0MB", "1e3GB", ""])
def test_bad_budget(text: str) -> None:
    with pytest.raises(ValueError, match="write a number and MB, GB, MiB or GiB"):
        parse_budget(text)


@pytest.mark.parametrize("step", [lambda count: 0, lambda count: 900 * (count >= 37), lambda count: -(count**2) // 40])
@pytest.mark.parametrize("budget", [0, 1103, 1104, 2000, 3871, 50_000, 10**9])
def test_largest_that_fits_is_the_largest(step: Callable[[int], int], budget: int) -> None:
    def total(count: int) -> int:
        return 1000 + 104 * count + step(count)

    fitting = [count for count in range(1, 201) if total(count) <= budget]
    assert largest_that_fits(total, budget, 200) == max(fitting, default=0)


def answer(recipe_file: RecipeFile, budget: int, *overrides: str) -> Fit:
    found = prepare(load_recipe(recipe_file(), list(overrides)), budget=budget).plan.fit
    assert found is not None
    return found


def test_the_largest_batch_fits_and_one_more_row_does_not(recipe_file: RecipeFile) -> None:
    budget = RUNTIME_BYTES + 25_000_000
    found = answer(recipe_file, budget)
    assert found.largest is not None
    assert 2 < found.largest.rows < 24
    for count in (found.largest.rows, found.largest.rows + 1):
        memory = prepare(load_recipe(recipe_file(), [f"training.batch_size={count}"])).plan.memory
        assert (memory.total <= budget) == (count == found.largest.rows)


def test_switches_are_sorted_not_on_yet_and_as_good_as_they_say(recipe_file: RecipeFile) -> None:
    overrides = ["training.batch_size=20", "training.optimizer=adamw_8bit", "model.attention=eager"]
    found = answer(recipe_file, RUNTIME_BYTES + 9_000_000, *overrides)
    totals = [switch.total for switch in found.switches]
    assert totals == sorted(totals)
    names = {tuple(switch.settings) for switch in found.switches}
    assert ("training.optimizer",) not in names
    assert {("training.gradient_checkpointing",), ("model.quantization",), ("model.attention",)} <= names
    recipe = load_recipe(recipe_file(), overrides)
    for switch in found.switches[:2]:
        memory = prepare(changed(recipe, switch.settings)).plan.memory
        assert memory.total == switch.total == found.recipe.total - switch.saved


def test_bar_shows_every_part_and_fills_its_width() -> None:
    memory = Forecast({"base weights": 10**9, "logits and loss": 1, "activations: MLP": 3 * 10**9}, 0, rows=1, tokens=1)
    bar, legend = memory_bar(memory, 40)
    assert len(bar.plain) == 40
    assert sorted(set(bar.plain)) == ["A", "L", "W"]
    assert bar.plain.count("A") == pytest.approx(30, abs=2)
    assert [entry.plain for entry in legend] == [" W  weights 25%", " A  activations 75%", " L  logits 0%"]


def test_fit_on_the_command_line(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = (
        ("2GB", 0, "which fits into 2.00 GB"),
        ("601MB", 1, "Not even one row fits."),
        ("24 apples", 2, "'24 apples' is not a size of memory"),
    )
    for budget, code, expected in answers:
        monkeypatch.setattr(sys, "argv", ["abba", "train", str(recipe_file()), "--fit", budget])
        with pytest.raises(SystemExit) as caught:
            main()
        assert int(caught.value.code or 0) == code
        assert expected in " ".join("".join(capsys.readouterr()).split())
    assert not (recipe_file().parent / "run").exists()


def test_console_without_colour_shows_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    memory = Forecast({"base weights": 10**9, "logits and loss": 10**9}, 0, rows=1, tokens=1)
    Console(width=80, no_color=True).print(memory_bar(memory, 20)[0])
    assert capsys.readouterr().out.splitlines()[0] == "W" * 10 + "L" * 10
