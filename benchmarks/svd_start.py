"""How long the SVD start of a model takes: every shape of a block of Llama-3.1-8B, timed, times its blocks.

    python benchmarks/svd_start.py [--device cpu|cuda] [--rank 16]

Random weights, whose flat spectrum needs no fewer passes than a real one's.
"""

import argparse
import time

import torch

from abba_cli.adapter.factors import svd_init

BLOCKS = 32
# (m, n) of a block's layers, and how many there are.
SHAPES = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}


def main() -> None:
    """Print seconds by shape, and for the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    total = 0.0
    for (m, n), count in SHAPES.items():
        weight = torch.randn(m, n, dtype=torch.bfloat16, device=options.device)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            svd_init(weight, options.rank, seed=0)
            if options.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        print(f"{m} x {n}: {sorted(times)[1]:.3f} s", flush=True)
        total += BLOCKS * count * sorted(times)[1]
    print(f"the model's {BLOCKS * sum(SHAPES.values())} layers: {total:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
