"""The update through its Khatri-Rao factors, s (x A_kr^T) B_kr^T, without any matrix of the size of the weight.

Shapes as in factors.py; A_kr is (R, n), B_kr (m, R), S = x A_kr^T and dS = dy B_kr are (T, R).
"""

from __future__ import annotations

import torch

from .factors import Factors, khatri_rao


def update(x: torch.Tensor, factors: Factors, s: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns s x dW'^T, (..., m), in `dtype`, for dW = s dW'."""
    B_kr, A_kr = (factor.to(dtype) for factor in khatri_rao(factors))
    return ((x @ A_kr.T) @ B_kr.T).mul_(s)


def gradients(
    dy: torch.Tensor, x: torch.Tensor, factors: Factors, s: float, needs_x: bool, needs_factors: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Returns dx of `update`, and the gradients of (B1, A1, B2, A2).

    Args:
        dy: (T, m).
        x: (T, n), in the dtype of dy.
        factors: The factors, whose dtypes their gradients take.
        s: The scale.
        needs_x: Whether dx is wanted; else None.
        needs_factors: Whether those of the factors are wanted; else they are None.
    """
    B_kr, A_kr = (factor.to(dy.dtype) for factor in khatri_rao(factors))
    dS = (dy @ B_kr).mul_(s)
    dx = dS @ A_kr if needs_x else None
    if not needs_factors:
        return dx, [None] * 4
    return dx, [*_contract((dy.T @ (x @ A_kr.T)).mul_(s), dS.T @ x, factors)]


def _contract(dB_kr: torch.Tensor, dA_kr: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, ...]:
    """Contracts the gradients of B_kr (m, R) and A_kr (R, n) to those of (B1, A1, B2, A2)."""
    B1, A1, B2, A2 = factors
    r1, r2 = A1.shape[0], A2.shape[0]
    dB = dB_kr.view(-1, r1, r2).to(B1.dtype)
    dA = dA_kr.view(r1, r2, -1).to(A1.dtype)
    return (
        (dB * B2[:, None, :]).sum(2),
        (dA * A2[None, :, :]).sum(1),
        (dB * B1[:, :, None]).sum(1),
        (dA * A1[:, None, :]).sum(0),
    )
