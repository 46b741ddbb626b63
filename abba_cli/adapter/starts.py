"""How an adapter's factors start from the base weight: the paper's way, and the others of its ablation.

Shapes and letters as in factors.py. The base weight itself stays as it is in all of them.
"""

from __future__ import annotations

from typing import Literal

import torch

from .factors import Factors, init_A2, svd_init, truncated_svd

Start = Literal["svd", "random", "swapped", "zeros", "ones", "roots", "top_next", "next_top"]
STARTS: tuple[Start, ...] = ("svd", "random", "swapped", "zeros", "ones", "roots", "top_next", "next_top")
FROM_WEIGHT: tuple[Start, ...] = ("svd", "swapped", "ones", "roots", "top_next", "next_top")
"""Those that are made from W0, once it is there."""
AWAY_FROM_BASE: tuple[Start, ...] = ("ones", "roots", "top_next", "next_top")
"""Those whose dW is not zero, so that the first step already meets another model than the base."""


def start_from_weight(start: Start, weight: torch.Tensor, factors: Factors) -> Factors:
    """Returns the four factors that a start makes of the base weight (https://arxiv.org/abs/2505.14238, table of starts).

    - svd: B1 A1 is the truncated SVD of W0; B2 A2 as they are (B2 = 0).
    - swapped: B2 A2 is the truncated SVD; B1 = 0 and A1 random.
    - ones: B1 A1 is the truncated SVD, B2 A2 is 1 everywhere.
    - roots: the truncated SVDs of sign(W0) sqrt|W0| and of sqrt|W0|, whose product is near W0.
    - top_next: B1 A1 has the first r1 singular triplets of W0, B2 A2 the next r2.
    - next_top: B2 A2 has the first r2, B1 A1 the next r1.

    Args:
        start: One of `FROM_WEIGHT`.
        weight: W0, shape (m, n).
        factors: What the factors are so far; they give the ranks.
    """
    B1, A1, B2, A2 = factors
    (r1, n), r2 = A1.shape, len(A2)
    if start == "svd":
        return Factors(*svd_init(weight, r1), B2, A2)
    if start == "swapped":
        return Factors(torch.zeros_like(B1), init_A2(r1, n), *svd_init(weight, r2))
    if start == "ones":
        return Factors(*svd_init(weight, r1), torch.full_like(B2, r2**-0.5), torch.full_like(A2, r2**-0.5))
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if start == "roots":
        root = wide.abs().sqrt()
        return Factors(*svd_init(wide.sign() * root, r1), *svd_init(root, r2))
    first, second = _consecutive(wide, *((r1, r2) if start == "top_next" else (r2, r1)))
    return Factors(*first, *second) if start == "top_next" else Factors(*second, *first)


Pair = tuple[torch.Tensor, torch.Tensor]


def _consecutive(weight: torch.Tensor, first: int, second: int) -> tuple[Pair, Pair]:
    """The pairs (B, A) of the first singular triplets of a weight and of those that come after them."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    U, S, Vh = truncated_svd(weight, first + second, generator)
    root = S.sqrt()
    B, A = U * root, root[:, None] * Vh
    return (B[:, :first], A[:first]), (B[:, first:], A[first:])
