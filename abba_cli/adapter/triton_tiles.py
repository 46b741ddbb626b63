# Kernels are written in Triton's language, whose arguments are no Python types; Triton itself ships none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What one program of each Triton kernel computes; triton_kernels.py launches them and holds the legend.

A pair is (B, A, stride of B's rows, of B's ranks, of A's ranks, of A's columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl


@triton.jit
def product(pair, rows, cols, m, n, R: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """Returns the tile of B A at these rows and columns in float32."""
    return tl.dot(left(pair, rows, m, R, K, DOT), right(pair, cols, n, R, K, DOT), input_precision="tf32x3")


@triton.jit
def left(pair, rows, m, R: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """Loads these rows of B, (BM, K). Ranks beyond R are zero, so they add nothing to a product."""
    k = tl.arange(0, K)[None, :]
    return tl.load(pair[0] + rows[:, None] * pair[2] + k * pair[3], mask=(rows[:, None] < m) & (k < R), other=0.0).to(DOT)


@triton.jit
def right(pair, cols, n, R: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """Loads these columns of A, (K, BN)."""
    k = tl.arange(0, K)[:, None]
    return tl.load(pair[1] + k * pair[4] + cols[None, :] * pair[5], mask=(k < R) & (cols[None, :] < n), other=0.0).to(DOT)


# Whether TRITON_INTERPRET was set when Triton was imported, which cannot change later.
INTERPRETED = not isinstance(product, triton.JITFunction)


def tuned(*tiles: tuple[int, int, int], stride: Sequence[str] = ()) -> Any:
    """Decorates a kernel to try tiles of (BM, BN, warps) once for each shape and stride. The interpreter takes the first."""
    if INTERPRETED:
        BM, BN, _ = tiles[0]
        return triton.heuristics({"BM": lambda arguments: BM, "BN": lambda arguments: BN})
    configs = [triton.Config({"BM": BM, "BN": BN}, num_warps=warps, num_stages=2) for BM, BN, warps in tiles]
    return triton.autotune(configs, key=["m", "n", "R1", "R2", "DOT", *stride])


# At ranks up to 32 none of these tiles makes the compiler spill registers, on an A100 or an H100; 128 x 128 does.
@tuned((64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8))
@triton.jit
def add_delta(
    out, W, w_row, w_col, pair1, pair2, s, m, n,
    R1: tl.constexpr, R2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DOT: tl.constexpr, HAS_W: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of out = W0 + s P1 * P2."""
    rows, cols = tile_at(BM, BN)
    inside = (rows[:, None] < m) & (cols[None, :] < n)
    total = s * product(pair1, rows, cols, m, n, R1, K1, DOT) * product(pair2, rows, cols, m, n, R2, K2, DOT)
    if HAS_W:
        total += tl.load(W + rows[:, None] * w_row + cols[None, :] * w_col, mask=inside).to(tl.float32)
    tl.store(out + rows[:, None] * n + cols[None, :], total.to(out.dtype.element_ty), mask=inside)


@tuned((64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8))
@triton.jit
def dequantize_4bit(
    out, packed, absmax, code, pair1, pair2, s, m, n, BYTES_PER_BLOCK: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of out = W0 + s P1 * P2 for a W0 in 4 bits; each byte, and the scale of its block, is loaded once."""
    rows, cols = tile_at(BM, BN)
    in_row = (tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2))[None, :]
    at = rows[:, None] * (n // 2) + in_row
    there = (rows[:, None] < m) & (in_row < n // 2)
    byte = tl.load(packed + at, mask=there, other=0).to(tl.int32)
    scale = tl.load(absmax + at // BYTES_PER_BLOCK, mask=there, other=0.0)
    W = tl.interleave(tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale)
    total = W + s * product(pair1, rows, cols, m, n, R1, K1, DOT) * product(pair2, rows, cols, m, n, R2, K2, DOT)
    inside = (rows[:, None] < m) & (cols[None, :] < n)
    tl.store(out + rows[:, None] * n + cols[None, :], total.to(out.dtype.element_ty), mask=inside)


# BN is the same in all, since it cuts up the sums, and tuning must not change a bit. 64 spills registers.
@tuned((64, 32, 4), (64, 32, 8), (128, 32, 8), stride=("g_col",))
@triton.jit
def contract(
    grad1, grad2, G, g_row, g_col, pair1, pair2, s, m, n, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradients of BM rows of B1 and B2, summed over one part of the columns."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    B1, B2 = left(pair1, rows, m, R1, K1, DOT), left(pair2, rows, m, R2, K2, DOT)
    D1, D2 = tl.zeros((BM, K1), tl.float32), tl.zeros((BM, K2), tl.float32)
    first = tl.program_id(1) * COLUMNS
    for start in range(first, tl.minimum(first + COLUMNS, n), BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        g = tl.load(G + rows[:, None] * g_row + cols[None, :] * g_col, mask=inside, other=0.0).to(tl.float32)
        A1, A2 = right(pair1, cols, n, R1, K1, DOT), right(pair2, cols, n, R2, K2, DOT)
        H1 = g * tl.dot(B2, A2, input_precision=PRECISION)
        H2 = g * tl.dot(B1, A1, input_precision=PRECISION)
        D1 = tl.dot(H1.to(DOT), tl.trans(A1), D1, input_precision=PRECISION)
        D2 = tl.dot(H2.to(DOT), tl.trans(A2), D2, input_precision=PRECISION)
    store_gradient(grad1, s * D1, rows, m, R1, K1)
    store_gradient(grad2, s * D2, rows, m, R2, K2)


@triton.jit
def store_gradient(grad, D, rows, m, R: tl.constexpr, K: tl.constexpr):
    """Stores D (BM, K) as this program's part of grad, (pointer, stride of the parts, of the rows, of the ranks)."""
    k = tl.arange(0, K)[None, :]
    at = tl.program_id(1).to(tl.int64) * grad[1] + rows[:, None] * grad[2] + k * grad[3]
    tl.store(grad[0] + at, D, mask=(rows[:, None] < m) & (k < R))


@triton.jit
def tile_at(BM: tl.constexpr, BN: tl.constexpr):
    """Returns the rows and columns of this program's tile. In 64 bits, since a large vocabulary has over 2^31 weights."""
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    return rows, tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
