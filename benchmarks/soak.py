"""A long run that is killed again and again, beside one that nothing happens to: both must end with the same bits.

    python benchmarks/soak.py [recipe.yaml] [--minutes 25] [--kills 20] [--set KEY=VALUE ...]

A few steps are timed first. Then the plain command trains undisturbed, in a folder of its own; and once more for about so many
minutes, in which it gets SIGKILL at random moments and is started again. The figures go to benchmarks/results/soak-cpu.json.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from abba_cli import RunDir, __version__

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "soak-cpu.json"
TIMED_STEPS = 6


def main() -> None:
    """Train both runs, compare them, and record what was lost on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(HERE.parent / "recipes" / "quickstart.yaml"))
    parser.add_argument("--minutes", type=float, default=25, help="of the run that is killed")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every-steps", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--set", dest="overrides", action="append", default=["training.batch_size=2"], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="abba-soak-") as folder:
        row = soaked(options, Path(folder))
    options.results.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))
    sys.exit(not row["equal"])


def soaked(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of a soak whose runs are written into a folder."""
    overrides = [*options.overrides, f"checkpoints.every_steps={options.every_steps}", "checkpoints.keep=2"]
    timed = RunDir(folder / "timed")
    began = time.monotonic()
    finish(options.recipe, timed, [*overrides, f"training.max_steps={TIMED_STEPS}"])
    training = timed.provenance()["outcome"]["seconds"]
    start, step = time.monotonic() - began - training, training / TIMED_STEPS
    # Every kill costs a start, and on average half of what lies between two checkpoints.
    lost = options.kills * (start + step * options.every_steps / 2)
    steps = round((60 * options.minutes - lost - start) / step)
    if steps < max(2 * options.every_steps, options.kills + 3):
        sys.exit(
            f"{options.minutes:g} minutes do not hold {options.kills} kills: a start takes {start:.0f} s, a step {step:.2f} s"
        )
    overrides.append(f"training.max_steps={steps}")
    print(f"a start takes {start:.0f} s, a step {step:.2f} s: {steps} steps", flush=True)

    whole, broken = RunDir(folder / "whole"), RunDir(folder / "broken")
    began = time.monotonic()
    finish(options.recipe, whole, overrides)
    undisturbed = time.monotonic() - began
    print(f"undisturbed: {undisturbed:.0f} s", flush=True)
    began = time.monotonic()
    kills = killed(options, broken, overrides, steps, step)
    finish(options.recipe, broken, overrides)
    seconds = time.monotonic() - began
    outcome = broken.provenance()["outcome"]
    return {
        "equal": same_bits(broken, whole),
        "kills": len(kills),
        "kills_inside_a_checkpoint": sum(kill["inside_a_checkpoint"] for kill in kills),
        "steps": steps,
        "every_steps": options.every_steps,
        "steps_lost": sum(kill["steps_lost"] for kill in kills),
        "most_steps_lost": max((kill["steps_lost"] for kill in kills), default=0),
        "minutes": round(seconds / 60, 1),
        "undisturbed_minutes": round(undisturbed / 60, 1),
        "saving_share": round(outcome["saving_seconds"] / outcome["seconds"], 4),
        "recipe": Path(options.recipe).name,
        "overrides": overrides,
        "abba": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def killed(options: argparse.Namespace, run: RunDir, overrides: Sequence[str], steps: int, step: float) -> list[dict[str, Any]]:
    """Kill a run at random moments, each time after a start of its own.

    A moment is a random part of a step after a random step: drawn by the clock, the last ones might come too late on a machine
    that has become faster.
    """
    moments = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    for after in sorted(moments.sample(range(1, steps - 1), options.kills)):
        process = train(options.recipe, run, overrides)
        while _last_step(run) < after:
            if process.poll() is not None:
                sys.exit(f"abba train ended with {process.returncode} after step {_last_step(run)}")
            time.sleep(0.02)
        time.sleep(moments.uniform(0, step))
        process.kill()
        process.wait()
        complete = run.complete_checkpoints()
        kept = int(complete[-1].name.rpartition("-")[2]) if complete else 0
        folders = len(list(run.checkpoints.glob("checkpoint-*")))
        reached = _last_step(run)
        kills.append({"steps_lost": reached - kept, "inside_a_checkpoint": folders > len(complete)})
        print(f"kill {len(kills)}: at step {reached}, goes on after step {kept}", flush=True)
    return kills


def _last_step(run: RunDir) -> int:
    return max((row["step"] for row in run.metrics()), default=0)


def train(recipe: str, run: RunDir, overrides: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start `abba train`."""
    settings = [part for one in (*overrides, f"output={run.path}") for part in ("--set", one)]
    return subprocess.Popen([sys.executable, "-m", "abba_cli", "train", recipe, *settings], stdout=subprocess.DEVNULL)


def finish(recipe: str, run: RunDir, overrides: Sequence[str]) -> None:
    """Run `abba train` to its end."""
    if code := train(recipe, run, overrides).wait():
        sys.exit(f"abba train ended with {code}")


def same_bits(run: RunDir, other: RunDir) -> bool:
    """Whether two runs have the same weights, and the same loss in every step, each once."""
    found, expected = (load_file(one.path / "adapter_model.safetensors") for one in (run, other))
    losses = [[(row["step"], row["loss"]) for row in one.metrics()] for one in (run, other)]
    return (
        found.keys() == expected.keys()
        and all(torch.equal(found[name], expected[name]) for name in expected)
        and losses[0] == losses[1]
    )


if __name__ == "__main__":
    main()
