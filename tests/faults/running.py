"""Trainings in processes of their own: started, watched, ended, and compared with one that nothing happened to."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from abba_cli import RunDir, load_recipe

STEPS, EVERY = 24, 4
# Dropout, accumulation and four epochs: a run that goes on in a wrong place, or with wrong random numbers, ends elsewhere.
SECTIONS = {
    "adapter": "{r1: 4, r2: 3, alpha: 4, dropout: 0.1}",
    "training": f"{{max_steps: {STEPS}, batch_size: 2, gradient_accumulation: 2, learning_rate: 1e-2}}",
    "evaluation": "{every_steps: 8}",
    "checkpoints": f"{{every_steps: {EVERY}, keep: 2}}",
}
SECONDS = 300  # that a training may take before it counts as hung

# The libraries are imported once, by a server of which each training is a fork: the same command in a process of its own, but
# here in two seconds where a new interpreter takes ten.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    [
        "bitsandbytes",
        "matplotlib.backends.backend_agg",
        "transformers.models.llama.modeling_llama",
        "abba_cli.cli",
        "abba_cli.training",
        "abba_cli.pushing",
        "abba_cli.ui.steps",
        "abba_cli.ui.training",
    ]
)
STARTED: list[BaseProcess] = []


@dataclass(frozen=True)
class Training:
    """An `abba train` that has been started.

    Attributes:
        process: Its process.
        run: Its output.
        printed: What it prints, both streams.
    """

    process: BaseProcess
    run: RunDir
    printed: Path

    def said(self) -> str:
        """What it has printed so far, without the spaces: the lines of a log are folded, also within a path."""
        return "".join(self.printed.read_text().split())

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return as soon as something has happened; the training must still be running then."""
        until = time.monotonic() + SECONDS
        while not happened():
            assert self.process.is_alive(), self.printed.read_text()
            assert time.monotonic() < until, self.printed.read_text()
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        """Return when a step has been logged."""
        self.wait_for(lambda: last_step(self.run) >= step)

    def ended(self) -> int:
        """Its exit code, negative for a signal, once it has ended; it never shows a traceback."""
        self.process.join(SECONDS)
        hung = self.process.is_alive()
        self.process.kill()
        self.process.join()
        text = self.printed.read_text()
        assert not hung, text
        assert "Traceback" not in text, text
        code = self.process.exitcode
        assert code is not None
        return code

    def killed(self) -> int:
        """Kill it; returns how many steps have to be made anew."""
        self.process.kill()
        self.process.join()
        return steps_lost(self.run)


def start(recipe: Path, *overrides: str, before: Callable[[], object] | None = None, options: Sequence[str] = ()) -> Training:
    """Run `abba train` in a process of its own.

    Args:
        recipe: The recipe.
        overrides: `key=value`.
        before: Called in that process first.
        options: Other arguments of the command.
    """
    arguments = [str(recipe), *(part for one in overrides for part in ("--set", one)), *options]
    output = Path(load_recipe(recipe, overrides).output)
    printed = recipe.with_name(f"printed-{time.monotonic_ns()}.txt")
    printed.touch()
    process = WARM.Process(target=_train, args=(arguments, printed, before))
    process.start()
    STARTED.append(process)
    return Training(process, RunDir(output), printed)


def _train(arguments: Sequence[str], printed: Path, before: Callable[[], object] | None) -> None:
    stream = printed.open("w", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    sys.argv = ["abba", "train", *arguments]
    if before is not None:
        before()
    from abba_cli.cli import main

    main()


def last_step(run: RunDir) -> int:
    """The last step that has been logged."""
    return max((row["step"] for row in run.metrics()), default=0)


def newest(run: RunDir) -> Path | None:
    """The checkpoint that the next start has to go on from."""
    return next(reversed(run.complete_checkpoints()), None)


def steps_lost(run: RunDir) -> int:
    """How many steps that were made have to be made anew."""
    checkpoint = newest(run)
    return last_step(run) - (int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)


def goes_on(recipe: Path, *overrides: str, before: Callable[[], object] | None = None) -> Training:
    """Run the same command again, to its end; it must go on from the newest checkpoint that is whole."""
    run = RunDir(Path(load_recipe(recipe, overrides).output))
    checkpoint, finished = newest(run), run.is_run and run.finished
    training = start(recipe, *overrides, before=before)
    assert training.ended() == 0, training.printed.read_text()
    if finished:
        assert "hasfinishedalready" in training.said()
    elif checkpoint is not None:
        assert f"Goingonfrom{''.join(str(checkpoint).split())},after" in training.said()
    return training


def bytes_lost(run: RunDir, whole: RunDir) -> int:
    """Bytes that an undisturbed run has and this one has not: files that are missing, and another adapter."""
    missing = 0
    for file in (path for path in whole.path.rglob("*") if path.is_file()):
        here = run.path / file.relative_to(whole.path)
        if not here.is_file():
            missing += file.stat().st_size
        elif file.suffix == ".safetensors":
            missing += sum(a != b for a, b in zip(file.read_bytes(), here.read_bytes(), strict=True))
    return missing


def check_same_end(run: RunDir, whole: RunDir) -> None:
    """Compare with an undisturbed run: the weights of adapter and last checkpoint, every metric once, no file too many."""
    for name in ("adapter_model.safetensors", f"checkpoints/checkpoint-{STEPS}/adapter_model.safetensors"):
        found, expected = (load_file(one.path / name) for one in (run, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), f"{run.path} ended with other weights"
    assert history(run) == history(whole)
    names = [{str(path.relative_to(one.path)) for path in one.path.rglob("*")} for one in (run, whole)]
    assert names[0] - {".lock"} == names[1]  # a lock without a holder does no harm
    assert run.finished


def history(run: RunDir) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock and on the machine."""
    timed = {"tokens_per_second", "seconds", "processor_seconds", "saving_seconds", "memory_bytes", "eval_seconds"}
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]
