"""ABBA in plain torch: the specification that the fast kernels have to agree with.

Shape legend
    m, n        out_features and in_features of the adapted layer; W0 is (m, n)
    r1, r2      ranks of the two pairs; R = r1 * r2 bounds the rank of the update
    B1 (m, r1)  A1 (r1, n)  B2 (m, r2)  A2 (r2, n)     the four trainable factors
    s           scale of the update, a number
    T           tokens in the batch; x is (..., n), y is (..., m)

Paper: "ABBA-Adapters", https://arxiv.org/abs/2505.14238v4
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# Columns of the range finder beyond the rank asked for, and its power iterations. With these the error of B1 A1 is
# within 0.2% of the best possible even on a Gaussian matrix, whose flat spectrum is the worst case, and within 1e-5
# on a spectrum that decays as 1 / sqrt(k) (tests/adapter/test_factors.py).
OVERSAMPLE = 16
POWER_ITERATIONS = 6
EXACT_UP_TO = 128  # smaller side of a matrix whose exact SVD takes milliseconds anyway


class Factors(NamedTuple):
    """The four factors of one adapter on one layer: B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n)."""

    B1: torch.Tensor
    A1: torch.Tensor
    B2: torch.Tensor
    A2: torch.Tensor


def scale(alpha: float, r1: int, r2: int, exponent: float = 0.5) -> float:
    """Returns s = alpha^2 / (r1 r2)^exponent; with 1/2 the update is rank-stable (Theorem 2)."""
    return float(alpha * alpha / (r1 * r2) ** exponent)


def delta_weight(factors: Factors, s: float) -> torch.Tensor:
    """Returns dW = s (B1 A1) * (B2 A2), shape (m, n) (equation 3)."""
    B1, A1, B2, A2 = factors
    return s * ((B1 @ A1) * (B2 @ A2))


def khatri_rao(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns B_kr (m, R) and A_kr (R, n) with B_kr @ A_kr == (B1 @ A1) * (B2 @ A2) (Theorem 1).

    Index order: B_kr[i, k1 * r2 + k2] = B1[i, k1] B2[i, k2] and A_kr[k1 * r2 + k2, j] = A1[k1, j] A2[k2, j].
    """
    B1, A1, B2, A2 = factors
    B_kr = (B1[:, :, None] * B2[:, None, :]).flatten(1)
    A_kr = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
    return B_kr, A_kr


def forward(x: torch.Tensor, factors: Factors, s: float) -> torch.Tensor:
    """Returns x @ dW^T, shape (..., m), for x of shape (..., n)."""
    return x @ delta_weight(factors, s).T


def init_pair(shape_B: tuple[int, int], shape_A: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a random (B, A), float32, from torch's global generator.

    Each is uniform within sqrt(1 / fan_in), so that the entries of B A have the spread of a fresh `nn.Linear`, up to
    a constant. This is what PEFT's LoHa does.
    """
    B, A = torch.empty(shape_B), torch.empty(shape_A)
    torch.nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return B, A


def init_A2(r2: int, n: int) -> torch.Tensor:
    """Draws A2 (r2, n), float32, uniform within sqrt(6 / n), from torch's global generator.

    This is Kaiming's bound for a ReLU (fan-in, gain sqrt(2)), the default of `kaiming_uniform_`. The released code
    of the paper uses it too, so the paper's values of alpha hold for it; PEFT's LoRA uses sqrt(1 / n) instead.
    """
    return torch.nn.init.kaiming_uniform_(torch.empty(r2, n))


def svd_init(weight: torch.Tensor, rank: int, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts the first pair from the base weight: B1 = U sqrt(S), A1 = sqrt(S) V^T (equation 6).

    Args:
        weight: W0, shape (m, n), any floating dtype; not changed.
        rank: r1. The rank may exceed min(m, n), where no further singular vectors exist. Those columns of B1 are
            then zero, so that B1 A1 stays the SVD, and those rows of A1 are random within sqrt(1 / n), so that the
            columns receive gradients, as B does at the start of a LoRA.
        seed: seed of the range finder's sketch and of the rows above. None takes `torch.initial_seed()`, the number
            given to the last `torch.manual_seed`. So the result depends on the weight and on that number only: not
            on the order of the layers, nor on what was drawn before.

    Returns:
        B1 (m, rank) and A1 (rank, n), float32 (float64 for a float64 weight), on the weight's device.
    """
    m, n = weight.shape
    generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = truncated_svd(weight, min(rank, m, n), generator)
    root = S.sqrt()
    B1, A1 = U * root, root[:, None] * Vh
    missing = rank - root.numel()
    if missing > 0:
        rows = (2 * torch.rand(missing, n, generator=generator) - 1) / math.sqrt(n)
        B1 = torch.cat([B1, B1.new_zeros(m, missing)], dim=1)
        A1 = torch.cat([A1, rows.to(A1)], dim=0)
    return B1, A1


def truncated_svd(weight: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the leading singular triplets: U (m, rank), S (rank,), V^T (rank, n).

    A randomised range finder with power iterations (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1,
    https://arxiv.org/abs/0909.4061); exact where the matrix is small, or hardly larger than the sketch.
    `torch.svd_lowrank` has neither a generator nor oversampling.
    """
    m, n = weight.shape
    sketch = rank + max(OVERSAMPLE, rank)
    if min(m, n) <= max(EXACT_UP_TO, 2 * sketch):
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        # Drawn on the CPU, so that every device starts from the same numbers.
        omega = torch.randn(n, sketch, generator=generator).to(weight)
        Q = torch.linalg.qr(weight @ omega).Q
        for _ in range(POWER_ITERATIONS):
            Q = torch.linalg.qr(weight.T @ Q).Q
            Q = torch.linalg.qr(weight @ Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
        U = Q @ U
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    # Singular vectors have a free sign; fixing it makes libraries and devices agree.
    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(U)
    return U * sign, S, sign.T * Vh
