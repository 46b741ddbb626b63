"""Memory that runs out in the middle: the message has the forecast and a lighter setting, with which the run goes on."""

from functools import partial
from pathlib import Path

import pytest
from breaking import allocate_too_much, at_step
from conftest import Faults
from running import goes_on, history, newest, start, steps_lost

from abba_cli import RunDir


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_out_of_memory(recipe: Path, undisturbed: RunDir, faults: Faults, device: str) -> None:
    with faults.of("out of memory") as tally:
        training = start(recipe, before=partial(at_step, 14, partial(allocate_too_much, device)))
        assert training.ended() == 1
        assert "abba:outofmemory:about0." in training.said()
        assert "GBwereforecast,andthisdevicehas" in training.said()
        assert "--settraining.batch_size=1--settraining.gradient_accumulation=4,orwith--settraining.grad" in training.said()
        assert "checkpoint-12iskept" in training.said()
        tally.add(steps_lost(training.run))
        goes_on(recipe)
        tally.compare(training.run, undisturbed)


@pytest.mark.parametrize(
    "lighter",
    [
        ("training.batch_size=1", "training.gradient_accumulation=4"),
        pytest.param(("training.gradient_checkpointing=true",), marks=pytest.mark.slow),
    ],
)
def test_what_is_advised_can_be_gone_on_with(recipe: Path, undisturbed: RunDir, halted: RunDir, lighter: tuple[str, ...]) -> None:
    """The same rows in every step; dropout draws other numbers for other batches, and without it sums are rounded otherwise."""
    assert newest(halted) == halted.checkpoints / "checkpoint-16"
    goes_on(recipe, *lighter)
    assert halted.finished
    found, expected = history(halted), history(undisturbed)
    for key in ("step", "epoch", "tokens", "learning_rate"):
        assert [row.get(key) for row in found] == [row.get(key) for row in expected]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (found, expected)]
    assert losses[0][:16] == losses[1][:16]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("heavier", [("training.batch_size=4",), ("training.gradient_accumulation=4",)])
def test_another_number_of_rows_is_another_run(recipe: Path, halted: RunDir, heavier: tuple[str, ...]) -> None:
    refused = start(recipe, *heavier)
    assert refused.ended() == 1
    assert "holdsarunofanotherrecipe" in refused.said()
