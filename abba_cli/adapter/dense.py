"""The effective weight W0 + dW, and the factors' gradients from G, the gradient of that weight.

Shapes as in factors.py; G (m, n) = dy^T x. `transposed` is whether a weight is stored as (n, m), as transformers' Conv1D does.

On a CUDA device with Triton each is one pass that writes nothing of the size of the weight but its result (triton_kernels.py).
Elsewhere it is PyTorch's products, and passes over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch

from .factors import Factors
from .quantised import QuantisedWeight

Scaled = tuple[Factors, float]
Products = tuple[torch.Tensor, torch.Tensor]
Weight = torch.Tensor | QuantisedWeight


def effective_weight(
    weight: torch.Tensor | None,
    adapters: Sequence[Scaled],
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    own: bool = False,
) -> torch.Tensor:
    """Returns W0 + sum of s dW in W0's layout, summed in the wider of the dtypes and rounded once to `dtype`.

    Args:
        weight: W0, or None for the sum of the updates alone.
        adapters: (factors, s) of each adapter.
        transposed: whether W0 is stored as (n, m).
        dtype: of the result; None takes W0's.
        own: whether W0 may be written over.
    """
    total = weight
    for (B1, A1, B2, A2), s in adapters:
        P1, P2 = (A1.T @ B1.T, A2.T @ B2.T) if transposed else (B1 @ A1, B2 @ A2)
        if total is not None and torch.promote_types(total.dtype, P1.dtype) == total.dtype:
            total = total.addcmul_(P1, P2, value=s) if own else torch.addcmul(total, P1, P2, value=s)
        else:
            # In place, in the product's own memory: fresh memory of this size costs a CPU more than the arithmetic.
            P1.mul_(P2).mul_(s)
            total = P1 if total is None else P1.add_(total)
        own = True
    assert total is not None
    return total.to(dtype or (total if weight is None else weight).dtype)


def make_products(adapters: Sequence[Scaled], transposed: bool, dtype: torch.dtype) -> list[Products]:
    """Returns B1 A1 and B2 A2 of each adapter, in W0's layout, for a layer that trains in `dtype`.

    For bfloat16 they are made in bfloat16, which changes dW by less than 1% of itself, while its sum with W0 is rounded to 8 bits
    of W0 in any case, and G to 8 bits of its own. Float16 has too narrow a range for that.

    Returns:
        (m, n) each or, if `transposed`, (n, m); an empty list where a GPU kernel makes them as it goes.
    """
    if _on_triton(None, adapters, dtype):
        return []
    pairs = []
    for four, _ in adapters:
        wide = torch.promote_types(torch.promote_types(four.B1.dtype, dtype), torch.float32)
        working = dtype if dtype == torch.bfloat16 else wide
        B1, A1, B2, A2 = (factor.to(working) for factor in four)
        pairs.append((A1.T @ B1.T, A2.T @ B2.T) if transposed else (B1 @ A1, B2 @ A2))
    return pairs


def add_update(
    weight: Weight | None,
    adapters: Sequence[Scaled],
    transposed: bool,
    dtype: torch.dtype,
    pairs: Sequence[Products] = (),
) -> torch.Tensor:
    """Returns W0 + sum of s dW in W0's layout and `dtype`, for one forward or backward.

    Args:
        weight: W0, or None for the sum of the updates alone. A dequantised one is written over.
        adapters: (factors, s) of each adapter.
        transposed: whether W0 is stored as (n, m).
        dtype: of the layer's matmul and of the result.
        pairs: the result of `make_products`, which stays as it is. Without it dW is made in the factors' dtype, as in a merge.
    """
    packed = weight.packed() if isinstance(weight, QuantisedWeight) else None
    kernels = _on_triton(packed.values if packed else None, adapters, dtype)
    if kernels is not None and packed is not None:
        return kernels.dequantize_4bit(*packed, adapters, dtype)  # type: ignore[no-any-return]
    own = isinstance(weight, QuantisedWeight)
    total = weight() if isinstance(weight, QuantisedWeight) else weight
    kernels = _on_triton(total, adapters, dtype)
    if kernels is not None:
        return kernels.add_delta(total, adapters, transposed, dtype)  # type: ignore[no-any-return]
    if not pairs:
        return effective_weight(total, adapters, transposed, dtype, own)
    for (P1, P2), (_, s) in zip(pairs, adapters, strict=True):
        if total is None:
            total = torch.mul(P1, P2).mul_(s)
        elif own and total.dtype == P1.dtype:
            total.addcmul_(P1, P2, value=s)
        else:
            total = torch.addcmul(total.to(P1.dtype), P1, P2, value=s)
        own = True
    assert total is not None
    return total.to(dtype)


def factor_gradients(
    G: torch.Tensor, factors: Factors, s: float, pair: Products | None, transposed: bool
) -> list[torch.Tensor | None]:
    """Returns the gradients of (B1, A1, B2, A2) from G: dB1 = s (G * (B2 A2)) A1^T, dA1 = s B1^T (G * (B2 A2)).

    Args:
        G: (m, n).
        factors: the factors, whose dtypes the gradients take.
        s: the scale.
        pair: B1 A1 and B2 A2 in W0's layout, as `make_products` gives them; overwritten. None where a GPU kernel makes them.
        transposed: whether W0 is stored as (n, m).
    """
    if pair is None:
        kernels = _on_triton(G, [(factors, s)], factors.B1.dtype)
        assert kernels is not None
        return list(kernels.contract(G, factors, s))
    P1, P2 = (P.T for P in pair) if transposed else pair
    B1, A1, B2, A2 = (factor.to(P1.dtype) for factor in factors)
    G = G.to(P1.dtype)
    H1, H2 = P2.mul_(G), P1.mul_(G)
    grads = (H1 @ A1.T, B1.T @ H1, H2 @ A2.T, B2.T @ H2)
    return [grad.to(factor.dtype).mul_(s) for grad, factor in zip(grads, factors, strict=True)]


def _on_triton(matrix: torch.Tensor | None, adapters: Sequence[Scaled], dtype: torch.dtype) -> ModuleType | None:
    """The GPU kernels, where they take these arguments."""
    if not adapters or adapters[0][0].B1.device.type != "cuda":
        return None
    kernels = _triton_kernels()
    return kernels if kernels is not None and kernels.supported(matrix, adapters, dtype) else None


@lru_cache(maxsize=1)
def _triton_kernels() -> ModuleType | None:
    try:
        from . import triton_kernels
    except ImportError:  # Triton comes with CUDA builds of PyTorch only
        return None
    return triton_kernels
