"""What changes around a run: the clock, and the data."""

import os
from functools import partial
from itertools import pairwise
from pathlib import Path

from breaking import shift_clock
from conftest import Faults
from running import goes_on, start, steps_lost

from abba_cli import RunDir

HOUR = 3600.0


def test_a_clock_that_jumps(recipe: Path, undisturbed: RunDir, halted: RunDir, faults: Faults) -> None:
    """Back by hours and forth by days between steps, with checkpoints whose dates are the wrong way round.

    transformers takes its times from `time.time` and can choose checkpoints by their dates; a run that counted on either would
    go on from another checkpoint, keep the wrong ones, or record times that run backwards.
    """
    with faults.of("a clock that jumps") as tally:
        for hours, checkpoint in enumerate(reversed(halted.complete_checkpoints()), start=1):
            os.utime(checkpoint, (hours * HOUR, hours * HOUR))
        tally.add(steps_lost(halted))
        goes_on(recipe, before=partial(shift_clock, {17: -5 * HOUR, 19: 48 * HOUR, 21: -100 * HOUR, 23: HOUR}))
        tally.compare(halted, undisturbed)
        rows = [row for row in halted.metrics() if "loss" in row]
        assert all(earlier["seconds"] < later["seconds"] < HOUR for earlier, later in pairwise(rows))
        assert all(row["tokens_per_second"] > 0 for row in rows)


def test_data_that_changes_under_a_run(recipe: Path, undisturbed: RunDir, rows: Path, faults: Faults, tmp_path: Path) -> None:
    """A run reads its data when it starts. The next start finds that they are others, and goes on when they are back."""
    data = tmp_path / "rows.jsonl"
    data.write_text(rows.read_text())
    override = f"data.train.0.path={data}"
    with faults.of("data that changes under a run") as tally:
        training = start(recipe, override)
        training.wait_for_step(5)
        data.write_text(rows.read_text().replace("It is 3", "It is 4"))
        training.wait_for_step(13)
        tally.add(training.killed())
        refused = start(recipe, override)
        assert refused.ended() == 1
        assert "abba:thedataisnotwhattherunin" in refused.said()
        assert "bringtheolddataback,chooseanotheroutput,or--restarttostartover" in refused.said()
        data.write_text(rows.read_text())
        goes_on(recipe, override)
        tally.compare(training.run, undisturbed)
