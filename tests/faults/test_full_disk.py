"""A disk that fills up while a run trains, and one that can no longer be written: the run says so, and goes on when it can."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import Faults
from running import Training, goes_on, start, steps_lost

from abba_cli import RunDir

PAGE = 4096
# What is left when the first checkpoint is there. A checkpoint takes 180 kB, the tokenizer of the finished run 3.5 MB.
LEFT = {"a checkpoint": 100_000, "metrics": 0, "the final save": 1_500_000}


def fill(disk: Path, left: int, training: Training) -> None:
    """Have something else take the disk, all but `left` bytes, while the training cannot notice."""
    os.kill(training.process.pid or 0, signal.SIGSTOP)
    if left == 0:
        # The file system gives whole pages: the next line shall need a new one.
        with training.run.metrics_file.open("a") as stream:
            stream.write("\n" * (-training.run.metrics_file.stat().st_size % PAGE))
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free - left)
    os.kill(training.process.pid or 0, signal.SIGCONT)


@pytest.mark.parametrize("during", LEFT)
def test_a_full_disk(recipe: Path, undisturbed: RunDir, small_disk: Path, faults: Faults, during: str) -> None:
    output = f"output={small_disk / 'run'}"
    with faults.of(f"disk full during {during}") as tally:
        training = start(recipe, output)
        training.wait_for(lambda: bool(training.run.complete_checkpoints()))
        fill(small_disk, LEFT[during], training)
        assert training.ended() == 1
        assert "abba:cannotwriteto" in training.said()
        assert "MBfree);makeroomorchooseanotheroutput,thenrunthesamecommandagain" in training.said()
        finished_steps = (training.run.checkpoints / "checkpoint-24").exists()
        assert finished_steps == (during == "the final save")
        tally.add(steps_lost(training.run))
        (small_disk / "filler").unlink()
        goes_on(recipe, output)
        tally.compare(training.run, undisturbed)


def test_a_disk_that_can_only_be_read(
    recipe: Path, undisturbed: RunDir, halted: RunDir, small_disk: Path, faults: Faults
) -> None:
    """A mount, as permissions do not bind root."""
    shutil.copytree(halted.path, small_disk / "run")
    output = f"output={small_disk / 'run'}"
    with faults.of("read-only output") as tally:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=20)
        training = start(recipe, output)
        assert training.ended() == 1
        assert "abba:cannotwriteto" in training.said()
        assert "chooseanotheroutput" in training.said()
        tally.add(steps_lost(training.run))
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True, timeout=20)
        goes_on(recipe, output)
        tally.compare(training.run, undisturbed)
