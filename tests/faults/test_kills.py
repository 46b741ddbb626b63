"""SIGKILL at random moments, at random file operations, and at chosen ones: inside the start, a checkpoint and the final save."""

import random
from functools import partial
from pathlib import Path

import pytest
from breaking import die_at, die_before
from conftest import Faults
from running import STEPS, Training, goes_on, last_step, newest, start, steps_lost

from abba_cli import RunDir

KILLED = -9


def went_on_from(training: Training, checkpoint: Path | None) -> bool:
    """Whether a killed training had gone on from where it should, if it came so far as to say so."""
    said = training.said()
    where = f"Goingonfrom{checkpoint},after" if checkpoint else ""
    return "Goingonfrom" not in said or bool(where and "".join(where.split()) in said)


def test_killed_at_random_moments(
    recipe: Path, undisturbed: RunDir, seconds: float, many: int | None, faults: Faults, tmp_path: Path
) -> None:
    """A moment is a random part of a step after a random step: by the clock alone, a busy machine dies before its first one."""
    moments, left, number = random.Random(6), many or 2, 0
    while left:
        number += 1
        output = tmp_path / f"run-{number}"
        with faults.of("SIGKILL at a random moment") as tally:
            while left:
                before = newest(RunDir(output))
                step = moments.randint(min(last_step(RunDir(output)), STEPS - 1), STEPS - 1)
                training = start(recipe, f"output={output}")
                training.wait_for_step(step)
                training.process.join(moments.uniform(0, seconds / STEPS))
                if not training.process.is_alive():
                    break
                tally.add(training.killed())
                left -= 1
                assert went_on_from(training, before)
            goes_on(recipe, f"output={output}")
            tally.compare(RunDir(output), undisturbed)


def test_killed_at_random_file_operations(
    recipe: Path, undisturbed: RunDir, operations: int, many: int | None, faults: Faults, tmp_path: Path
) -> None:
    moments, left, number = random.Random(7), many or 1, 0
    while left:
        number += 1
        output = tmp_path / f"run-{number}"
        with faults.of("SIGKILL at a random file operation") as tally:
            while left:
                before = newest(RunDir(output))
                training = start(recipe, f"output={output}", before=partial(die_at, output, moments.randint(1, operations)))
                code = training.ended()
                assert code in (0, KILLED), training.printed.read_text()
                assert went_on_from(training, before)
                if code == 0:
                    break
                tally.add(steps_lost(RunDir(output)))
                left -= 1
            goes_on(recipe, f"output={output}")
            tally.compare(RunDir(output), undisturbed)


# In the order in which one run meets them, each start going on from what the kill before has left.
MOMENTS = [
    ("os.rename {run}/.provenance.json.partial {run}/provenance.json", 1, None),
    ("os.rename {run}/.recipe.yaml.partial {run}/recipe.yaml", 1, None),
    ("os.mkdir {run}/checkpoints/checkpoint-4", 1, None),
    ("open {run}/checkpoints/checkpoint-4/trainer_state.json w", 1, None),
    ("os.rename {run}/checkpoints/checkpoint-8/.manifest.json.partial {run}/checkpoints/checkpoint-8/manifest.json", 1, 4),
    ("os.remove {run}/checkpoints/checkpoint-4/manifest.json", 1, 12),
    ("shutil.rmtree {run}/checkpoints/checkpoint-8", 1, 16),
    ("os.rename {run}/.metrics.jsonl.partial {run}/metrics.jsonl", 1, 16),
    ("os.rename {run}/.final/adapter_model.safetensors {run}/adapter_model.safetensors", 1, 24),
    ("open {run}/loss.png w+", 1, 24),
    ("os.rename {run}/.provenance.json.partial {run}/provenance.json", 2, 24),
]


def test_killed_inside_every_kind_of_write(
    recipe: Path, undisturbed: RunDir, many: int | None, faults: Faults, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    with faults.of("SIGKILL inside a write") as tally:
        for operation, occurrence, kept in MOMENTS if many else MOMENTS[::3]:
            before = newest(run)
            training = start(recipe, before=partial(die_before, run.path, operation.format(run=run.path), occurrence))
            assert training.ended() == KILLED, (operation, training.printed.read_text())
            assert went_on_from(training, before)
            checkpoint = newest(run)
            assert (checkpoint.name if checkpoint else None) == (f"checkpoint-{kept}" if kept else None), operation
            tally.add(steps_lost(run))
        goes_on(recipe)
        tally.compare(run, undisturbed)


@pytest.mark.parametrize(
    "stage", ["Starting from singular vectors", pytest.param("Loading the base model", marks=pytest.mark.slow)]
)
def test_killed_before_anything_is_written(recipe: Path, undisturbed: RunDir, faults: Faults, stage: str, tmp_path: Path) -> None:
    with faults.of("SIGKILL while the run starts") as tally:
        training = start(recipe)
        training.wait_for(lambda: "".join(stage.split()) in training.said())
        tally.add(training.killed())
        assert not RunDir(tmp_path / "run").complete_checkpoints()
        goes_on(recipe)
        tally.compare(RunDir(tmp_path / "run"), undisturbed)


@pytest.mark.parametrize(
    "operation",
    [
        "os.remove optimizer.pt",
        pytest.param("os.rename {run}/.provenance.json.partial {run}/provenance.json", marks=pytest.mark.slow),
    ],
)
def test_killed_while_starting_over(recipe: Path, undisturbed: RunDir, halted: RunDir, faults: Faults, operation: str) -> None:
    """What is half cleared away is neither a damaged run nor a stranger's folder: the plain command starts anew."""
    with faults.of("SIGKILL inside --restart") as tally:
        occurrence = len(halted.complete_checkpoints()) if "optimizer" in operation else 1
        breaking = partial(die_before, halted.path, operation.format(run=halted.path), occurrence)
        assert start(recipe, options=["--restart"], before=breaking).ended() == KILLED
        assert not halted.complete_checkpoints()
        tally.add()
        goes_on(recipe)
        tally.compare(halted, undisturbed)
