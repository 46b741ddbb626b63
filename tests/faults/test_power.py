"""A power cut: only what was synced is left, and the run goes on from it."""

from functools import partial
from pathlib import Path

import pytest
from conftest import Faults
from power import cut_at_step, cut_before
from running import goes_on, last_step, newest, start

from abba_cli import RunDir


@pytest.mark.parametrize("step", [18, pytest.param(5, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)])
def test_the_power_fails(recipe: Path, undisturbed: RunDir, faults: Faults, tmp_path: Path, step: int) -> None:
    """The newest checkpoint is whole afterwards, and so are the metrics up to it."""
    kept = (step - 1) // 4 * 4
    with faults.of("power cut") as tally:
        output, left = tmp_path / "before", tmp_path / "run"
        assert start(recipe, f"output={output}", before=partial(cut_at_step, output, left, step)).ended() == -9
        run = RunDir(left)
        checkpoint = newest(run)
        assert checkpoint is not None
        assert checkpoint.name == f"checkpoint-{kept}"
        assert last_step(run) >= kept
        tally.add(last_step(RunDir(output)) - kept)
        goes_on(recipe)
        tally.compare(run, undisturbed)


@pytest.mark.slow
def test_the_power_fails_when_the_first_file_is_written(
    recipe: Path, undisturbed: RunDir, faults: Faults, tmp_path: Path
) -> None:
    with faults.of("power cut") as tally:
        output, left = tmp_path / "before", tmp_path / "run"
        assert start(recipe, f"output={output}", before=partial(cut_before, output, left, "/provenance.json")).ended() == -9
        assert not any(left.iterdir())
        tally.add()
        goes_on(recipe)
        tally.compare(RunDir(left), undisturbed)


def test_the_power_fails_when_all_is_done(recipe: Path, undisturbed: RunDir, faults: Faults, tmp_path: Path) -> None:
    """What says that the run has finished is not on the disk before the adapter is."""
    with faults.of("power cut") as tally:
        output, left = tmp_path / "before", tmp_path / "run"
        assert start(recipe, f"output={output}", before=partial(cut_before, output, left, "/.lock")).ended() == -9
        tally.add()
        goes_on(recipe)
        tally.compare(RunDir(left), undisturbed)
