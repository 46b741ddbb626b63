"""ABBA's Triton kernels beside the PyTorch they replace, on one CUDA card: time of each pass over a weight matrix, and error.

    python benchmarks/kernels_gpu.py [--rank 16] [--factors float32] [--rounds 30]
    python benchmarks/kernels_gpu.py --interpret        no card: tiny shapes in Triton's interpreter, errors only

The shapes are those of a layer of Llama 3.2 3B and of Llama 3.1 8B, with a bfloat16 or nf4 base. Both ways take turns, in another
order each round, each from a cold L2 cache, as in a training step; times are medians. A warm-up round compiles and tunes.
An error is the largest of a matrix, relative to its largest entry, against float64. Ends within a few minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

# (m, n) of q and o; k and v; gate and up; down. How often a layer has each.
SHAPES = {
    "3B": {(3072, 3072): 2, (1024, 3072): 2, (8192, 3072): 2, (3072, 8192): 1},
    "8B": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
}
TINY = {"tiny": {(70, 192): 1, (33, 256): 1}}
# More than any card's L2 cache. Clearing it takes longer than Python needs to launch what is timed, so that is not timed with it.
COLD_BYTES = 2**30


class Case(NamedTuple):
    """One pass over a matrix, computed in two ways, and its result in float64."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    exact: Callable[[], list[torch.Tensor]]


def main() -> int:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="r1 and r2")
    parser.add_argument("--factors", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nothing above does
    elif not torch.cuda.is_available():
        print("No CUDA card: nothing to measure. --interpret checks the kernels' results without one.")
        return 1
    torch.manual_seed(0)
    device = "cpu" if options.interpret else "cuda"
    print(describe(device, options))
    print("| model | pass | m x n | ours, ms | PyTorch, ms | ours / PyTorch | error, ours | error, PyTorch |")
    print("|---|---|---|---|---|---|---|---|")
    # What PyTorch's side then takes is the way of a machine without Triton.
    with mock.patch("abba_cli.adapter.dense._on_triton", return_value=None):
        for model, shapes in (TINY if options.interpret else SHAPES).items():
            print_model(model, shapes, device, options)
    return 0


def print_model(model: str, shapes: dict[tuple[int, int], int], device: str, options: argparse.Namespace) -> None:
    """The rows of one model: each shape, then the sums over a layer."""
    totals: dict[str, list[float]] = {}
    for (m, n), count in shapes.items():
        for case in cases(m, n, options.rank, getattr(torch, options.factors), device):
            errors = [relative_error(way, case.exact) for way in (case.ours, case.theirs)]
            times = None if options.interpret else medians(case, options.rounds)
            print(row(model, case.name, f"{m} x {n}", times, errors), flush=True)
            if times is not None:
                before = totals.get(case.name, [0.0, 0.0])
                totals[case.name] = [total + count * time for total, time in zip(before, times, strict=True)]
    for name, times in totals.items():
        print(row(model, name, "a whole layer", times, None), flush=True)


def cases(m: int, n: int, rank: int, factor_dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The three passes over a matrix of this shape, with random values of the size that training has."""
    from bitsandbytes import functional

    from abba_cli.adapter import dense
    from abba_cli.adapter import triton_kernels as kernels
    from abba_cli.adapter.factors import Factors, delta_weight

    def random(*shape: int, size: float) -> torch.Tensor:
        return torch.randn(shape, device=device) * size

    shapes = ((m, rank), (rank, n), (m, rank), (rank, n))
    factors = Factors(*(random(*shape, size=rank**-0.5).to(factor_dtype) for shape in shapes))
    # Triton 3.9's interpreter cuts bfloat16 off instead of rounding.
    s, dtype = 0.02, torch.float32 if device == "cpu" else torch.bfloat16
    adapters = [(factors, s)]
    W0, G = random(m, n, size=0.02).to(dtype), random(m, n, size=1e-3).to(dtype)
    packed, state = functional.quantize_4bit(W0, blocksize=64, quant_type="nf4")

    def gradients() -> Any:
        (pair,) = dense.make_products(adapters, False, dtype)
        return dense.factor_gradients(G, factors, s, pair, False)

    def exact_gradients() -> list[torch.Tensor]:
        B1, A1, B2, A2 = (factor.double() for factor in factors)
        H1, H2 = s * G.double() * (B2 @ A2), s * G.double() * (B1 @ A1)
        return [H1 @ A1.T, B1.T @ H1, H2 @ A2.T, B2.T @ H2]

    def exact_sum(weight: torch.Tensor) -> list[torch.Tensor]:
        return [weight.double() + delta_weight(Factors(*(factor.double() for factor in factors)), s)]

    yield Case(
        "W0 + dW",
        lambda: kernels.add_delta(W0, adapters, False, dtype),
        lambda: dense.add_update(W0, adapters, False, dtype),
        lambda: exact_sum(W0),
    )
    yield Case(
        "nf4 W0 + dW",
        lambda: kernels.dequantize_4bit(packed, state.absmax, state.code, 64, (m, n), adapters, dtype),
        lambda: dense.effective_weight(functional.dequantize_4bit(packed, state), adapters, False, dtype, own=True),
        lambda: exact_sum((state.code[nibbles(packed)].view(-1, 64) * state.absmax[:, None]).view(m, n)),
    )
    yield Case("gradients", lambda: kernels.contract(G, factors, s), gradients, exact_gradients)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The 4-bit values of each byte, the high one first."""
    flat = packed.view(-1).int()
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)


def medians(case: Case, rounds: int) -> list[float]:
    """Milliseconds on the card of ours and theirs."""
    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device="cuda")
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for way in ((0, 1), (1, 0))[turn % 2]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            cold.zero_()
            start.record()
            (case.ours, case.theirs)[way]()
            end.record()
            end.synchronize()
            if turn:
                times[way].append(start.elapsed_time(end))
    return [statistics.median(one) for one in times]


def relative_error(way: Callable[[], Any], exact: Callable[[], list[torch.Tensor]]) -> float:
    """The largest error of the results, each relative to its largest entry."""
    result = way()
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    pairs = zip(results, exact(), strict=True)
    return max(float((one.double() - reference).abs().max() / reference.abs().max()) for one, reference in pairs)


def row(model: str, name: str, shape: str, times: list[float] | None, errors: list[float] | None) -> str:
    """A line of the table; what was not measured stays empty."""
    shown = ["", "", ""] if times is None else [f"{times[0]:.3f}", f"{times[1]:.3f}", f"{times[0] / times[1]:.2f}"]
    shown += ["", ""] if errors is None else [f"{error:.1e}" for error in errors]
    return "| " + " | ".join([model, name, shape, *shown]) + " |"


def describe(device: str, options: argparse.Namespace) -> str:
    """What the figures were taken on and with."""
    import triton

    card = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter, no times"
    setting = f"r1 = r2 = {options.rank}, {options.factors} factors, {options.rounds} rounds"
    return f"{card}; torch {torch.__version__}, triton {triton.__version__}; {setting}\n"


if __name__ == "__main__":
    sys.exit(main())
