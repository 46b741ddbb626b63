"""ABBA's passes over whole weight matrices as single GPU kernels, in Triton.

Shape legend (see factors.py for the mathematics)
    m, n, r1, r2                     out and in features, ranks
    W0 (m, n)                        frozen weight; G (m, n) the gradient of W0 + dW
    P1 = B1 A1, P2 = B2 A2 (m, n)    the two products; they exist tile by tile only
    D (rows, r)                      the gradient of the factor that stands left in its product
    BM, BN                           rows and columns of a tile; K1, K2 the ranks padded to what `tl.dot` takes

In plain PyTorch each of these computations writes P1 and P2 and reads them again, tens of bytes for each element of W0. Here an
element is read once (G twice) and written at most once.

Sums are float32. Products of float32 factors take three TF32 products each, which gives back float32's precision; bfloat16
factors are multiplied as they are. `contract` takes one TF32 product where G has 16 bits, since TF32 keeps as much of a number.
No sum depends on timing or on the tile sizes tried, so equal arguments give equal bits on equal cards.

Import this module only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_tiles as tiles
from .factors import Factors

Scaled = tuple[Factors, float]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTOR_DTYPES = (torch.float32, torch.bfloat16)
# Wider factors are better off with cuBLAS: arithmetic, not memory, sets the pace then, and the tiles would outgrow registers.
MAX_RANK = 64
# Columns that one program sums over. Fixed, not tuned, so that every card adds in the same order. 512 gives a square matrix of
# 4096 some 500 programs, four for each multiprocessor of an H100, and keeps the partial sums below a tenth of G.
COLUMNS_PER_PART = 512
# TF32, bfloat16 and asynchronous copies came with Ampere.
OLDEST_CAPABILITY = (8, 0)


def supported(matrix: torch.Tensor | None, adapters: Sequence[Scaled], dtype: torch.dtype) -> bool:
    """Says whether the functions of this module take these arguments.

    Args:
        matrix: W0 for `add_delta`, G for `contract`, the packed values for `dequantize_4bit`; None where there is none.
        adapters: (factors, s) of each adapter; for `contract` the one.
        dtype: of the result; for `contract` that of the factors.
    """
    factors = [factor for one, _ in adapters for factor in one]
    tensors = factors if matrix is None else [matrix, *factors]
    packed = matrix is not None and not matrix.is_floating_point()
    return (
        bool(factors)
        and all(_runs_on(tensor.device) and tensor.device == factors[0].device for tensor in tensors)
        and dtype in WEIGHT_DTYPES
        and (matrix is None or packed or matrix.dtype in WEIGHT_DTYPES)
        and all(B1.dtype in FACTOR_DTYPES and B1.dtype == A1.dtype == B2.dtype == A2.dtype for (B1, A1, B2, A2), _ in adapters)
        and all(max(A1.shape[0], A2.shape[0]) <= MAX_RANK for (_, A1, _, A2), _ in adapters)
        # A byte of a 4-bit weight would hold values of two rows.
        and not (packed and adapters[0][0].A1.shape[1] % 2)
    )


def add_delta(weight: torch.Tensor | None, adapters: Sequence[Scaled], transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    """Returns W0 + sum of s dW in W0's layout, summed in float32 and rounded once to `dtype`. One launch for each adapter.

    Args:
        weight: W0, (m, n) or, if `transposed`, (n, m), of any strides; None for the sum of the updates alone.
        adapters: (factors, s) of each adapter, at least one.
        transposed: whether W0 is stored as (n, m).
        dtype: of the result.
    """
    total = weight
    for i, (factors, s) in enumerate(adapters):
        B1, A1, B2, A2 = _flipped(factors) if transposed else factors
        m, n = B1.shape[0], A1.shape[1]
        result = B1.new_empty(m, n, dtype=dtype if i + 1 == len(adapters) else torch.float32)
        source = result if total is None else total  # never read from if None; a pointer is needed all the same
        with _current(result.device):
            tiles.add_delta[_tiles_of(m, n)](
                result, source, *source.stride(), *_pairs(B1, A1, B2, A2), s, m, n, **_options(A1, A2), HAS_W=total is not None
            )  # fmt: skip
        total = result
    assert total is not None
    return total


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    shape: tuple[int, int],
    adapters: Sequence[Scaled],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns W0 + sum of s dW, (m, n), for a W0 that bitsandbytes stores in 4 bits (nf4 or fp4). W0 itself is never rounded.

    Args:
        packed: two values a byte, the first in the high nibble, row by row; any shape and storage dtype, contiguous.
        absmax: float32 scale of each block; a nested one has to be dequantised before.
        code: float32, the 16 values that the nibbles stand for (`quant_state.code`).
        blocksize: values in a block, counted along the rows and on from row to row; even.
        shape: (m, n), n even.
        adapters: (factors, s) of each adapter, at least one.
        dtype: of the result.
    """
    m, n = shape
    (factors, s), *others = adapters
    result = factors.B1.new_empty(m, n, dtype=torch.float32 if others else dtype)
    with _current(result.device):
        tiles.dequantize_4bit[_tiles_of(m, n)](
            result, packed.view(torch.uint8), absmax, code, *_pairs(*factors), s, m, n, **_options(factors.A1, factors.A2),
            BYTES_PER_BLOCK=blocksize // 2,
        )  # fmt: skip
    return add_delta(result, others, False, dtype) if others else result


def contract(G: torch.Tensor, factors: Factors, s: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of (B1, A1, B2, A2): dB1 = s (G * P2) A1^T, dA1 = s B1^T (G * P2), and the same for pair 2.

    Args:
        G: (m, n), of any strides. Read twice: once by rows for dB1 and dB2, once by columns for dA1 and dA2.
        factors: the factors; the gradients have their shapes and their dtype.
        s: scale of the update.
    """
    m, n = G.shape
    dB = [B.new_empty(_parts(n), *B.shape, dtype=torch.float32) for B in (factors.B1, factors.B2)]
    dA = [A.new_empty(_parts(m), *A.shape, dtype=torch.float32) for A in (factors.A1, factors.A2)]
    _left_gradients(G, factors, s, *dB)
    # Transposing everything makes A the left factor, so that one kernel serves both.
    _left_gradients(G.T, _flipped(factors), s, dA[0].mT, dA[1].mT)
    # A sum of partial sums instead of atomic additions: these would come in another order each time.
    dB1, dB2, dA1, dA2 = (parts.sum(0).to(factors.B1.dtype) for parts in (*dB, *dA))
    return dB1, dA1, dB2, dA2


def _left_gradients(G: torch.Tensor, factors: Factors, s: float, D1: torch.Tensor, D2: torch.Tensor) -> None:
    """Writes each part's sum of the gradients of B1 and B2 to D1 (parts, m, r1) and D2 (parts, m, r2)."""
    m, n = G.shape

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(m, tile["BM"]), _parts(n)

    precision = "tf32x3" if G.dtype == torch.float32 else "tf32"
    with _current(G.device):
        tiles.contract[grid](
            (D1, *D1.stride()), (D2, *D2.stride()), G, *G.stride(), *_pairs(*factors), s, m, n,
            **_options(factors.A1, factors.A2), COLUMNS=COLUMNS_PER_PART, PRECISION=precision,
        )  # fmt: skip


def _flipped(factors: Factors) -> Factors:
    """The factors of dW^T."""
    B1, A1, B2, A2 = factors
    return Factors(A1.T, B1.T, A2.T, B2.T)


def _pairs(B1: torch.Tensor, A1: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor) -> tuple[Any, Any]:
    return (B1, A1, *B1.stride(), *A1.stride()), (B2, A2, *B2.stride(), *A2.stride())


def _options(A1: torch.Tensor, A2: torch.Tensor) -> dict[str, Any]:
    """The arguments that a kernel is compiled for: the ranks, padded for `tl.dot`, and the dtype it multiplies in."""
    r1, r2 = A1.shape[0], A2.shape[0]
    # Triton's interpreter (3.9) multiplies the bit patterns of bfloat16 (triton-lang/triton issue 11584).
    dot = tl.bfloat16 if A1.dtype == torch.bfloat16 and not tiles.INTERPRETED else tl.float32
    K1, K2 = (max(16, triton.next_power_of_2(r)) for r in (r1, r2))
    # Triton 3.9 warns where fusion is left to its default, which 3.10 changes.
    return {"R1": r1, "R2": r2, "K1": K1, "K2": K2, "DOT": dot, "enable_fp_fusion": True}


def _tiles_of(m: int, n: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    """The grid of a kernel that makes one tile a program. Columns first: neighbours then read neighbouring memory."""
    return lambda tile: (triton.cdiv(n, tile["BN"]), triton.cdiv(m, tile["BM"]))


def _parts(n: int) -> int:
    return int(triton.cdiv(n, COLUMNS_PER_PART))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' in a model that is spread over several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _runs_on(device: torch.device) -> bool:
    if tiles.INTERPRETED:
        return device.type == "cpu"
    # ROCm calls its devices "cuda", too, and has no TF32.
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    )
