"""One forward and one backward of an adapted layer, as plain functions of tensors.

Shape legend (see factors.py for the mathematics)
    m, n, T              out and in features, tokens
    x (..., n)  y (..., m)  G (m, n) = dy^T x
    weight (m, n), or (n, m) when `transposed`
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import factored
from .cost import Kernel, Shape, Way, choose
from .dense import Scaled, Weight, add_update, factor_gradients, make_products
from .factors import Factors
from .quantised import QuantisedWeight


class Call(NamedTuple):
    """What a layer is called with besides tensors.

    Attributes:
        scales: s of each adapter.
        transposed: whether W0 is stored as (n, m).
        dtype: of the matmul and the result.
        kernel: what the user asked for.
        training: whether gradients of the factors will be asked for.
        exact: whether W0 + dW has to be the weight of a merge, bit by bit.
    """

    scales: Sequence[float]
    transposed: bool
    dtype: torch.dtype
    kernel: Kernel
    training: bool
    exact: bool


def forward_pass(
    x: torch.Tensor, weight: Weight | None, bias: torch.Tensor | None, factors: Sequence[torch.Tensor], call: Call
) -> torch.Tensor:
    """Returns x (W0 + sum of s dW)^T + bias, (..., m).

    Args:
        x: (..., n).
        weight: W0, or None for the update alone.
        bias: (m,) or None.
        factors: B1, A1, B2, A2 of each adapter, one after the other.
        call: the rest.
    """
    transposed, dtype = call.transposed, call.dtype
    adapters = _adapters(factors, call.scales)
    with _without_autocast(x.device.type):
        way = _way(x, weight, adapters, call)
        xd = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if way.effective and adapters:
            pairs = [] if call.exact else make_products(adapters, transposed, dtype)
            return _matmul(xd, add_update(weight, adapters, transposed, dtype, pairs), bias, transposed)
        y = None if weight is None else _matmul(xd, _read(weight, dtype), bias, transposed)
        for four, s in adapters:
            update = factored.update(xd, four, s, dtype)
            y = update if y is None else y.add_(update)
        assert y is not None
        return y


def backward_pass(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: Weight | None,
    factors: Sequence[torch.Tensor],
    call: Call,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Returns dx in the dtype of x, and the gradients of the factors, from dy (..., m) and what `forward_pass` was given.

    Args:
        needs_x: whether dx is wanted; else None.
        needs: whether the gradient of each factor is wanted; else None in its place.
    """
    transposed, dtype = call.transposed, call.dtype
    adapters = _adapters(factors, call.scales)
    wanted = [any(needs[4 * i : 4 * i + 4]) for i in range(len(adapters))]
    grads: list[torch.Tensor | None] = [None] * len(needs)
    with _without_autocast(x.device.type):
        way = _way(x, weight, adapters, call)
        dy2 = dy.reshape(-1, dy.shape[-1])
        x2 = x.reshape(-1, x.shape[-1]).to(dtype)
        dense = way.dense and any(wanted)
        pairs = make_products(adapters, transposed, dtype) if (way.effective and needs_x) or dense else []
        dx = None
        if needs_x and (way.effective or weight is not None):
            if way.effective and adapters:
                W = add_update(weight, adapters, transposed, dtype, pairs)
            else:
                assert weight is not None
                W = _read(weight, dtype)
            dx = dy2 @ (W.T if transposed else W)
            del W  # before G comes
        G = dy2.T @ x2 if dense else None
        for i, (four, s) in enumerate(adapters):
            by_G = G is not None and wanted[i]
            if G is not None and wanted[i]:
                grads[4 * i : 4 * i + 4] = factor_gradients(G, four, s, pairs[i] if pairs else None, transposed)
            through = needs_x and not way.effective
            if through or (wanted[i] and not by_G):
                dx_i, found = factored.gradients(dy2, x2, four, s, through, wanted[i] and not by_G)
                if dx_i is not None:
                    dx = dx_i if dx is None else dx.add_(dx_i)
                if not by_G:
                    grads[4 * i : 4 * i + 4] = found
    return (
        None if dx is None else dx.view(x.shape).to(x.dtype),
        [grad if need else None for grad, need in zip(grads, needs, strict=True)],
    )


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Costs a tenth of what entering autocast does where there is none, which is the usual case."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _read(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    return (weight() if isinstance(weight, QuantisedWeight) else weight).to(dtype)


def _way(x: torch.Tensor, weight: Weight | None, adapters: Sequence[Scaled], call: Call) -> Way:
    n = x.shape[-1]
    ranks = tuple((four.A1.shape[0], four.A2.shape[0]) for four, _ in adapters)
    m = adapters[0][0].B1.shape[0] if adapters else 0
    shape = Shape(x.numel() // max(n, 1), m, n, ranks, call.dtype.itemsize, weight is not None, call.training)
    return choose(shape, call.kernel, x.device)


def _adapters(factors: Sequence[torch.Tensor], scales: Sequence[float]) -> list[Scaled]:
    return [(Factors(*factors[4 * i : 4 * i + 4]), s) for i, s in enumerate(scales)]


def _matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """The base layer's own matmul, call for call: a fresh adapter then changes no bit of its output."""
    if not transposed:
        return F.linear(x, weight, bias)
    x2 = x.reshape(-1, x.shape[-1])
    y = x2 @ weight if bias is None else torch.addmm(bias, x2, weight)
    return y.view(*x.shape[:-1], weight.shape[1])
