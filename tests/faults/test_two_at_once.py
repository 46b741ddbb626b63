"""The same run started twice: the second is refused while the first lives, and only then."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from conftest import Faults
from running import goes_on, start, steps_lost

from abba_cli import RunDir, disk, rundir
from abba_cli.errors import RunError


def test_the_second_of_two_is_refused(recipe: Path, undisturbed: RunDir, faults: Faults) -> None:
    with faults.of("the same run twice at once") as tally:
        first = start(recipe)
        first.wait_for_step(3)
        # Nobody feeds it from another process: no worker of a data loader, nor of the tokenisation, can die.
        assert not psutil.Process(first.process.pid).children(recursive=True)
        os.kill(first.process.pid or 0, signal.SIGSTOP)  # it lives, however long the second one takes to come to the lock
        second = start(recipe)
        assert second.ended() == 1
        assert "abba:anotherprocessistrainingin" in second.said()
        assert "waitforit,orchooseanotheroutput" in second.said()
        tally.add()
        os.kill(first.process.pid or 0, signal.SIGCONT)
        assert first.ended() == 0
        tally.compare(first.run, undisturbed)


def test_a_lock_whose_holder_was_killed_is_stale(recipe: Path, undisturbed: RunDir, halted: RunDir, faults: Faults) -> None:
    with faults.of("a stale lock") as tally:
        assert (halted.path / ".lock").exists()
        tally.add(steps_lost(halted))
        goes_on(recipe)
        tally.compare(halted, undisturbed)


def test_a_lock_that_its_holder_removes_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends between the moment at which another opens the file and the one at which it asks for the lock."""
    run = RunDir(tmp_path)
    flock = disk.fcntl.flock
    holder = rundir.locked(run)
    holder.__enter__()
    endings = [holder]

    def late(*arguments: object) -> None:
        if endings:
            endings.pop().__exit__(None, None, None)
        flock(*arguments)

    monkeypatch.setattr(disk.fcntl, "flock", late)
    with rundir.locked(run):
        assert (tmp_path / ".lock").exists()
        with pytest.raises(RunError, match="another process is training in"), rundir.locked(run):
            pass
    assert not (tmp_path / ".lock").exists()
