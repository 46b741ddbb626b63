"""SIGTERM, as preemption sends it: the training ends by itself within the grace, and loses no step."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from breaking import signal_in_evaluation
from conftest import Faults
from running import Training, goes_on, last_step, newest, start

from abba_cli import RunDir

GRACE_SECONDS = 30


def terminated(training: Training) -> None:
    """It ends with the exit code that a shell gives, says where it stands, and has a checkpoint there."""
    began = time.monotonic()
    assert training.ended() == 128 + signal.SIGTERM
    assert time.monotonic() - began < GRACE_SECONDS
    step = last_step(training.run)
    assert f"stoppedafterstep{step}of24;everythingissaved" in training.said()
    assert "Runthesamecommandagaintogoon" in training.said()
    checkpoint = newest(training.run)
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"


def test_terminated_at_a_random_step(recipe: Path, undisturbed: RunDir, many: int | None, faults: Faults) -> None:
    moments = random.Random(8)
    with faults.of("SIGTERM, 30 s before the end") as tally:
        step = 0
        for _ in range(3 if many else 1):
            step = moments.randint(step + 2, step + 6)
            training = start(recipe)
            training.wait_for_step(step)
            os.kill(training.process.pid or 0, signal.SIGTERM)
            terminated(training)
            tally.add()
            step = last_step(training.run)
        goes_on(recipe)
        tally.compare(training.run, undisturbed)


def test_terminated_in_an_evaluation(recipe: Path, undisturbed: RunDir, faults: Faults) -> None:
    """No step is made after it: an evaluation and a step may be too much for the grace."""
    with faults.of("SIGTERM in an evaluation") as tally:
        training = start(recipe, before=partial(signal_in_evaluation, 8))
        terminated(training)
        assert last_step(training.run) == 8
        tally.add()
        goes_on(recipe)
        tally.compare(training.run, undisturbed)


@pytest.mark.slow
def test_two_signals_lose_nothing(recipe: Path, undisturbed: RunDir, faults: Faults) -> None:
    with faults.of("two SIGTERMs") as tally:
        training = start(recipe)
        training.wait_for_step(10)
        os.kill(training.process.pid or 0, signal.SIGSTOP)  # so that both are waiting when it goes on
        os.kill(training.process.pid or 0, signal.SIGTERM)
        os.kill(training.process.pid or 0, signal.SIGCONT)
        training.wait_for(lambda: "Stopping" in training.said())
        os.kill(training.process.pid or 0, signal.SIGTERM)
        assert training.ended() == 128 + signal.SIGTERM
        tally.add()
        goes_on(recipe)
        tally.compare(training.run, undisturbed)
