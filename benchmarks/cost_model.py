"""How good the choice of a way of computing is: each way timed on many shapes, and the chosen one against the best.

    python benchmarks/cost_model.py [--device cpu|cuda] [--rounds 5] [--shapes N]

One adapted layer, forward and backward, the ways taking turns. Prints a table, and in how many cases the choice is within 10%
of the best; writes the rows to benchmarks/results/cost-model-<device>.jsonl.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from abba_cli.adapter import cost, passes
from abba_cli.adapter.cost import Shape, Way
from abba_cli.adapter.factors import Factors
from abba_cli.adapter.kernels import adapted_linear
from abba_cli.memory import reuse_freed_memory

LAYERS = {"135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)), "1B": ((2048, 2048), (512, 2048)), "3B": ((3072, 3072),)}
RANKS = (4, 16, 32)
TOKENS = (64, 1024)
WAYS = {
    "effective, G": Way(True, True),
    "effective, Khatri-Rao": Way(True, False),
    "factored, G": Way(False, True),
    "factored": Way(False, False),
}


def main() -> None:
    """Time the shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", type=int, default=10_000, help="only so many of them, evenly spread")
    options = parser.parse_args()
    reuse_freed_memory()
    device = torch.device(options.device)
    cases = [
        (model, m, n, r, T, dtype)
        for (model, layers), r, T, dtype in itertools.product(LAYERS.items(), RANKS, TOKENS, (torch.bfloat16, torch.float32))
        for m, n in layers
        if model == "135M" or dtype == torch.bfloat16
    ]
    cases = cases[:: max(1, len(cases) // options.shapes)]
    target = Path(__file__).parent / "results" / f"cost-model-{options.device}.jsonl"
    within, ratios = 0, []
    print("| layer | r1 = r2 | tokens | dtype | " + " | ".join(f"{name} (ms)" for name in WAYS) + " | chosen | chosen / best |")
    print("|---" * (6 + len(WAYS)) + "|", flush=True)
    with target.open("w") as file:
        for model, m, n, r, T, dtype in cases:
            times = time_ways(m, n, r, T, dtype, device, options.rounds)
            chosen = cost.choose(Shape(T, m, n, ((r, r),), dtype.itemsize, True, True), "auto", device)
            name = next(name for name, way in WAYS.items() if way == chosen)
            ratio = times[name] / min(times.values())
            ratios.append(ratio)
            within += ratio <= 1.10
            shown = " | ".join(f"{seconds * 1e3:.2f}" for seconds in times.values())
            print(f"| {model} {m} x {n} | {r} | {T} | {str(dtype)[6:]} | {shown} | {name} | {ratio:.2f} |", flush=True)
            row: dict[str, Any] = {"m": m, "n": n, "r": r, "T": T, "dtype": str(dtype), "seconds": times, "chosen": name}
            file.write(json.dumps({**row, "torch": torch.__version__, "threads": torch.get_num_threads()}) + "\n")
    print(f"\nwithin 10% of the best: {within} of {len(ratios)}; median {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")


def time_ways(m: int, n: int, r: int, T: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of one forward and backward of a layer (m, n), by way: medians of `rounds`, after one round of warm-up."""
    torch.manual_seed(0)
    weight = torch.randn(m, n, device=device, dtype=dtype)
    x = torch.randn(T, n, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(T, m, device=device, dtype=dtype)
    factors = Factors(*(torch.randn(s, device=device, requires_grad=True) for s in ((m, r), (r, n), (m, r), (r, n))))
    repeats = 1 + int(2e9 / (T * m * n))

    def run() -> None:
        for _ in range(repeats):
            y = adapted_linear(x, weight, None, [(factors, 0.1)], False, exact=False)
            torch.autograd.grad(y, (x, *factors), dy)

    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):
        for name, way in WAYS.items():
            with mock.patch.object(passes, "choose", lambda *_, way=way: way):
                found[name].append(_seconds(run, device) / repeats)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
