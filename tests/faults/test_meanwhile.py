"""A start that found one state of the run directory and gets its lock in another."""

import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest
from breaking import stop_before
from conftest import Faults
from running import goes_on, start, steps_lost

from abba_cli import RunDir, train
from abba_cli.errors import RunError


def test_another_process_trains_meanwhile(recipe: Path, undisturbed: RunDir, halted: RunDir, faults: Faults) -> None:
    """The slower one would take away what the faster has made, and go on from a checkpoint that is no more."""
    with faults.of("two starts, one after the other") as tally:
        slower = start(recipe, before=partial(stop_before, halted.path, "/.lock a"))
        slower.wait_for(lambda: psutil.Process(slower.process.pid).status() == psutil.STATUS_STOPPED)
        tally.add(steps_lost(halted))
        goes_on(recipe)
        os.kill(slower.process.pid or 0, signal.SIGCONT)
        assert slower.ended() == 1
        assert "abba:anotherprocesshastrainedin" in slower.said()
        tally.compare(halted, undisturbed)


def test_a_damaged_best_checkpoint_is_not_taken_for_the_result(recipe: Path) -> None:
    """It may be older than all that are verified when a run goes on. At this rate the evaluation loss rises."""
    overrides = ["evaluation.every_steps=1", "evaluation.patience=2", "training.learning_rate=0.5", "training.max_grad_norm=0"]
    run = train(recipe, overrides)
    used = run.provenance()["outcome"]["used_step"]
    assert used < run.provenance()["outcome"]["steps"]
    weights = run.checkpoints / f"checkpoint-{used}" / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (run.path / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=rf"checkpoint-{used}, which has the lowest evaluation loss, is damaged"):
        train(recipe, overrides)
    weights.write_bytes(good)
    assert train(recipe, overrides).finished
    assert (run.path / "adapter_model.safetensors").read_bytes() == good


def test_a_run_that_had_run_out_of_patience_makes_no_further_step(recipe: Path, tmp_path: Path) -> None:
    """Killed after its last checkpoint, it only has its end to write; with more patience it goes on."""
    overrides = ["evaluation.every_steps=1", "evaluation.patience=2", "training.learning_rate=0.5", "training.max_grad_norm=0"]
    run = train(recipe, overrides)
    outcome = run.provenance()["outcome"]
    adapter = (run.path / "adapter_model.safetensors").read_bytes()
    (run.path / "adapter_model.safetensors").unlink()
    again = train(recipe, overrides).provenance()["outcome"]
    assert {key: again[key] for key in ("steps", "used_step", "eval_loss")} == {
        key: outcome[key] for key in ("steps", "used_step", "eval_loss")
    }
    assert (run.path / "adapter_model.safetensors").read_bytes() == adapter
    (run.path / "adapter_model.safetensors").unlink()
    assert train(recipe, [*overrides, "evaluation.patience=9"]).provenance()["outcome"]["steps"] > outcome["steps"]
