"""An adapted layer's forward and backward as operations of PyTorch, for torch.compile.

Each is opaque to the compiler. Traced, the W0 + dW that both of them make would be recognised as the same and kept from one
to the other: a second copy of every weight. Shapes and arguments as in passes.py.
"""

from __future__ import annotations

from typing import Any

import torch

from .passes import Call, backward_pass, forward_pass


@torch.library.custom_op("abba::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    factors: list[torch.Tensor],
    scales: list[float],
    transposed: bool,
    dtype: torch.dtype,
    kernel: str,
    exact: bool,
) -> torch.Tensor:
    call = Call(scales, transposed, dtype, kernel, True, exact)  # type: ignore[arg-type]
    return forward_pass(x, weight, bias, factors, call)


@linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    factors: list[torch.Tensor],
    scales: list[float],
    transposed: bool,
    dtype: torch.dtype,
    kernel: str,
    exact: bool,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], factors[0].shape[0]), dtype=dtype)


@torch.library.custom_op("abba::linear_backward", mutates_args=())
def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    factors: list[torch.Tensor],
    scales: list[float],
    transposed: bool,
    dtype: torch.dtype,
    kernel: str,
    needs_x: bool,
    needs: list[bool],
) -> list[torch.Tensor]:
    call = Call(scales, transposed, dtype, kernel, True, False)  # type: ignore[arg-type]
    dx, grads = backward_pass(dy, x, weight, factors, call, needs_x, needs)
    return [grad for grad in (dx, *grads) if grad is not None]


@linear_backward.register_fake
def _(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    factors: list[torch.Tensor],
    scales: list[float],
    transposed: bool,
    dtype: torch.dtype,
    kernel: str,
    needs_x: bool,
    needs: list[bool],
) -> list[torch.Tensor]:
    dx = [x.new_empty(x.shape)] if needs_x else []
    return dx + [factor.new_empty(factor.shape) for factor, need in zip(factors, needs, strict=True) if need]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, factors, *ctx.settings, _ = inputs
    ctx.save_for_backward(x, weight, *factors)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.needs_x, ctx.needs = x.requires_grad, [factor.requires_grad for factor in factors]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, weight, *factors = ctx.saved_tensors
    found = iter(linear_backward(dy, x, weight, factors, *ctx.settings, ctx.needs_x, ctx.needs))
    dx = next(found) if ctx.needs_x else None
    grads = [next(found) if need else None for need in ctx.needs]
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, None, dbias, grads, None, None, None, None, None


linear.register_autograd(_backward, setup_context=_keep)
