"""Is the rounding of W0 + dW to bfloat16 harmless? The same run with it, and without any rounding of the update, over seeds.

    python benchmarks/rounding.py [--steps 300] [--seeds 42,43] [--out out/rounding]

The quickstart's data and model, one row a step. For each seed: a bfloat16 base through the effective weight, and a float32 base
with float32 factors beside it ("factored"), which rounds nothing to bfloat16. The rows of a seed come in the same order. Prints
the training loss over tenths of the run and the held-out loss, the largest difference that the rounding makes, and that between
seeds. A run that was stopped goes on.
"""

import argparse
import json
import statistics
from pathlib import Path

from abba_cli import load_recipe, train
from abba_cli.memory import reuse_freed_memory

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
HELD_OUT = RECIPE.parent / "data" / "word_problems_heldout.jsonl"
RESULTS = Path(__file__).parent / "results" / "rounding.jsonl"
PATHS = {"bfloat16, effective": ("bfloat16", "effective"), "float32, factored": ("float32", "factored")}


def main() -> None:
    """Make the runs and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="42,43")
    parser.add_argument("--out", default="out/rounding")
    options = parser.parse_args()
    reuse_freed_memory()
    curves: dict[tuple[str, str], list[float]] = {}
    RESULTS.write_text("")
    for seed in options.seeds.split(","):
        for name, (dtype, kernel) in PATHS.items():
            overrides = {
                "output": f"{options.out}/{dtype}-{kernel}-{seed}",
                "model.dtype": dtype,
                "adapter.kernel": kernel,
                "training.seed": seed,
                "training.max_steps": options.steps,
                "training.batch_size": 1,
                "training.learning_rate": "1e-3",
                "data.eval": f'[{{path: {HELD_OUT}, split: "train[:100]"}}]',
                "evaluation.at_start": "false",
                "evaluation.batch_size": 8,
                "evaluation.samples": 0,
            }
            run = train(load_recipe(RECIPE, [f"{key}={value}" for key, value in overrides.items()]))
            rows = run.metrics()
            losses = [row["loss"] for row in rows if "loss" in row]
            held_out = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
            tenth = len(losses) // 10
            curve = [statistics.mean(losses[i : i + tenth]) for i in range(0, 10 * tenth, tenth)]
            curves[name, seed] = [*curve, held_out]
            with RESULTS.open("a") as file:
                file.write(json.dumps({"path": name, "seed": int(seed), "losses": losses, "held_out": held_out}) + "\n")
            shown = " ".join(f"{loss:.4f}" for loss in curve)
            print(f"{name}, seed {seed}: {shown} | held-out {held_out:.4f}", flush=True)
    seeds = options.seeds.split(",")
    rounded, exact = PATHS
    by_rounding = [_largest(curves[rounded, seed], curves[exact, seed]) for seed in seeds]
    by_seed = [_largest(curves[exact, seeds[0]], curves[exact, seed]) for seed in seeds[1:]]
    print(f"largest difference of a tenth's training loss, of the held-out loss: by rounding {by_rounding}, by seed {by_seed}")


def _largest(one: list[float], other: list[float]) -> tuple[float, float]:
    differences = [round(abs(a - b), 4) for a, b in zip(one, other, strict=True)]
    return max(differences[:-1]), differences[-1]


if __name__ == "__main__":
    main()
