"""Fast and memory-lean autograd for ABBA: keeps only x and the factors for backward, never dW.

Shape legend (see factors.py for the mathematics)
    m, n, r1, r2, R = r1 * r2, T     out and in features, ranks, rank bound, tokens
    x (..., n)  y (..., m)           input and output
    weight (m, n), or (n, m) when `transposed` (transformers' Conv1D stores it that way)
    G (m, n) = dy^T x                the gradient of the effective weight W0 + dW

Two ways of computing, chosen for each call by counting multiplications (`use_effective_weight`):
    effective weight    y = x (W0 + dW)^T, one matmul; dW is made in the factors' dtype and rounded once with W0
    Khatri-Rao          y = x W0^T + s (x A_kr^T) B_kr^T, cheaper for few tokens or wide layers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .factors import Factors, khatri_rao

Scaled = tuple[Factors, float]
Weight = torch.Tensor | Callable[[], torch.Tensor]


def adapted_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, adapters: Sequence[Scaled], transposed: bool
) -> torch.Tensor:
    """Returns x (W0 + sum of s dW)^T + bias for a frozen W0.

    Args:
        x: (..., n). Cast to the dtype of the matmul: the weight's, or that of a surrounding `torch.autocast`.
        weight: W0, (m, n) or, if `transposed`, (n, m). Gets no gradient. A function is called for it in forward and
            again in backward, so that a dequantised W0 is never kept; its dtype is then taken to be that of x.
        bias: (m,) or None. Gets a gradient if it requires one.
        adapters: the active adapters as (factors, s); the factors may have any floating dtype.
        transposed: whether the weight is stored as (n, m).

    Returns:
        (..., m), in the dtype of the matmul, which is the dtype the base layer would return.
    """
    dtype = matmul_dtype(x, weight.dtype if isinstance(weight, torch.Tensor) else x.dtype)
    if not isinstance(weight, torch.Tensor) or use_effective_weight(x, adapters, shared=True):
        return _EffectiveLinear.apply(x, weight, bias, transposed, dtype, *_flatten(adapters))  # type: ignore[no-any-return, no-untyped-call]
    y = _matmul(x, weight, bias, transposed)
    for factors, s in adapters:
        y = y + _KhatriRaoLinear.apply(x, dtype, s, *factors)  # type: ignore[no-untyped-call]
    return y


def delta_linear(x: torch.Tensor, adapters: Sequence[Scaled], dtype: torch.dtype) -> torch.Tensor:
    """Returns x (sum of s dW)^T, (..., m), computed and returned in `dtype`: what is added to a base layer's output."""
    dtype = matmul_dtype(x, dtype)
    if use_effective_weight(x, adapters, shared=False):
        return _EffectiveLinear.apply(x, None, None, False, dtype, *_flatten(adapters))  # type: ignore[no-any-return, no-untyped-call]
    return sum(_KhatriRaoLinear.apply(x, dtype, s, *factors) for factors, s in adapters)  # type: ignore[no-untyped-call, return-value]


def effective_weight(
    weight: torch.Tensor | None, adapters: Sequence[Scaled], transposed: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Returns W0 + sum of s dW in W0's layout, summed in the wider of the dtypes and rounded once to `dtype`.

    Args:
        weight: W0, or None for the sum of the updates alone.
        adapters: (factors, s) of each adapter.
        transposed: whether W0 is stored as (n, m).
        dtype: of the result; None takes W0's.
    """
    total = weight
    for (B1, A1, B2, A2), s in adapters:
        P1, P2 = (A1.T @ B1.T, A2.T @ B2.T) if transposed else (B1 @ A1, B2 @ A2)
        if total is None:
            total = P1.mul_(P2).mul_(s)
        else:
            wide = total.to(torch.promote_types(total.dtype, P1.dtype))
            total = torch.addcmul(wide, P1, P2, value=s) if wide is weight else wide.addcmul_(P1, P2, value=s)
    assert total is not None
    return total.to(dtype or (total if weight is None else weight).dtype)


def use_effective_weight(x: torch.Tensor, adapters: Sequence[Scaled], shared: bool) -> bool:
    """Says whether making dW costs fewer multiplications than going through the Khatri-Rao factors.

    Args:
        x: the input, (..., n).
        adapters: (factors, s) of each adapter.
        shared: whether dW shares the base layer's matmul instead of needing one of its own.
    """
    # Not `torch.is_grad_enabled()`: reentrant checkpointing runs the first forward without gradients, and both
    # forwards should take the same way.
    training = any(factor.requires_grad for factors, _ in adapters for factor in factors)
    n = x.shape[-1]
    T = x.numel() // max(n, 1)
    dense = kr = 0
    for (B1, A1, B2, _), _ in adapters:
        m, R, ranks = B1.shape[0], A1.shape[0] * B2.shape[1], A1.shape[0] + B2.shape[1]
        # Backward makes the products again, then G, then the four contractions with it.
        gradients = min(T * m * n + 2 * m * n * ranks, 2 * T * R * (m + n))
        dense += m * n * ranks + (m * n * ranks + gradients if training else 0)
        kr += T * R * (m + n) + (2 * T * R * (m + n) + T * R * n if training else 0)
    if not shared:
        dense += T * m * n * (2 if training else 1)
    return dense <= kr


def matmul_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype a base layer would compute in: `dtype`, unless autocast is on (which leaves float64 alone)."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, dtype):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _flatten(adapters: Sequence[Scaled]) -> list[Any]:
    return [item for factors, s in adapters for item in (s, *factors)]


def _unflatten(flat: Sequence[Any]) -> list[Scaled]:
    return [(Factors(*flat[i + 1 : i + 5]), flat[i]) for i in range(0, len(flat), 5)]


class _EffectiveLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + bias. Keeps x, W0 and the factors; makes W0 + dW again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Weight | None,
        bias: torch.Tensor | None,
        transposed: bool,
        dtype: torch.dtype,
        *flat: Any,
    ) -> torch.Tensor:
        ctx.make_weight, weight = (None, weight) if not callable(weight) else (weight, None)
        with torch.autocast(x.device.type, enabled=False):
            W0 = ctx.make_weight() if ctx.make_weight else weight
            effective = effective_weight(W0, _unflatten(flat), transposed, dtype)
            y = _matmul(x.to(dtype), effective, None if bias is None else bias.to(dtype), transposed)
        ctx.save_for_backward(x, weight, *(item for item in flat if isinstance(item, torch.Tensor)))
        ctx.scales = flat[::5]
        ctx.transposed, ctx.dtype = transposed, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, *tensors = ctx.saved_tensors
        adapters = [(Factors(*tensors[4 * i : 4 * i + 4]), s) for i, s in enumerate(ctx.scales)]
        needs_x, _, needs_bias, _, _, *needs = ctx.needs_input_grad
        dx = dbias = None
        grads: list[Any] = [None] * len(needs)
        with torch.autocast(x.device.type, enabled=False):
            if needs_x:
                W0 = ctx.make_weight() if ctx.make_weight else weight
                effective = effective_weight(W0, adapters, ctx.transposed, ctx.dtype)
                dx = (dy @ (effective.T if ctx.transposed else effective)).to(x.dtype)
                del effective
            dy2 = dy.reshape(-1, dy.shape[-1])
            if needs_bias:
                dbias = dy2.sum(0).to(ctx.bias_dtype)
            if any(needs):
                x2 = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                G = dy2.T @ x2
                for i, (factors, s) in enumerate(adapters):
                    grads[5 * i + 1 : 5 * i + 5] = _gradients_dense(G, factors, s, needs[5 * i + 1 : 5 * i + 5])
        return dx, None, dbias, None, None, *grads


class _KhatriRaoLinear(torch.autograd.Function):
    """y = s (x A_kr^T) B_kr^T. Keeps x and the factors; makes A_kr, B_kr and x A_kr^T again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dtype: torch.dtype,
        s: float,
        B1: torch.Tensor,
        A1: torch.Tensor,
        B2: torch.Tensor,
        A2: torch.Tensor,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            B_kr, A_kr = (factor.to(dtype) for factor in khatri_rao(Factors(B1, A1, B2, A2)))
            y = ((x.to(dtype) @ A_kr.T) @ B_kr.T) * s
        ctx.save_for_backward(x, B1, A1, B2, A2)
        ctx.dtype, ctx.s = dtype, s
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        factors = Factors(*tensors)
        needs_x, _, _, *needs = ctx.needs_input_grad
        dx = None
        grads: tuple[torch.Tensor | None, ...] = (None,) * 4
        with torch.autocast(x.device.type, enabled=False):
            B_kr, A_kr = (factor.to(ctx.dtype) for factor in khatri_rao(factors))
            dy2 = dy.reshape(-1, dy.shape[-1])
            dS = (dy2 @ B_kr) * ctx.s
            if needs_x:
                dx = (dS @ A_kr).view(x.shape).to(x.dtype)
            if any(needs):
                x2 = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                grads = _gradients_khatri_rao((dy2.T @ (x2 @ A_kr.T)) * ctx.s, dS.T @ x2, factors)
        return dx, None, None, *grads


def _matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """The base layer's own matmul, call for call: a fresh adapter then changes no bit of its output."""
    if not transposed:
        return F.linear(x, weight, bias)
    x2 = x.reshape(-1, x.shape[-1])
    y = x2 @ weight if bias is None else torch.addmm(bias, x2, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def _gradients_dense(G: torch.Tensor, factors: Factors, s: float, needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """Gradients of (B1, A1, B2, A2) from G (m, n): dB1 = s (G * (B2 A2)) A1^T, dA1 = s B1^T (G * (B2 A2))."""
    B1, A1, B2, A2 = factors
    G = G.to(B1.dtype)
    grads: list[torch.Tensor | None] = [None] * 4
    if needs[0] or needs[1]:
        H = (B2 @ A2).mul_(G)
        grads[:2] = (H @ A1.T).mul_(s), (B1.T @ H).mul_(s)
    if needs[2] or needs[3]:
        H = (B1 @ A1).mul_(G)
        grads[2:] = (H @ A2.T).mul_(s), (B2.T @ H).mul_(s)
    return grads


def _gradients_khatri_rao(dB_kr: torch.Tensor, dA_kr: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, ...]:
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
