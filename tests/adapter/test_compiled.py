"""The operations for torch.compile: they are what PyTorch asks of an operation, and keep no more than the eager layer does."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from abba_cli.adapter.compiled import linear
from abba_cli.adapter.factors import Factors
from abba_cli.adapter.kernels import adapted_linear

T, M, N = 40, 9, 13


def layer(dtype: torch.dtype, adapters: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    shapes = ((M, 3), (3, N), (M, 2), (2, N)) * adapters
    x = torch.randn(2, T, N, dtype=dtype, requires_grad=True)
    bias = torch.randn(M, dtype=dtype, requires_grad=True)
    return x, torch.randn(M, N, dtype=dtype), bias, [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kernel", ["effective", "factored"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_is_a_proper_operation(kernel: str, adapters: int) -> None:
    """PyTorch's own check of schema, fake kernel, autograd and tracing."""
    x, weight, bias, factors = layer(torch.float32, adapters)
    arguments = (x, weight, bias, factors, [0.3] * adapters, False, torch.float32, kernel, True)
    torch.library.opcheck(linear, arguments, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["effective", "factored"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "x and B1 frozen"])
def test_gradients_are_the_eager_layers(kernel: str, frozen: bool) -> None:
    x, weight, bias, factors = layer(torch.float32)
    if frozen:
        x.requires_grad_(False)
        factors[0].requires_grad_(False)
    leaves = [leaf for leaf in (x, bias, *factors) if leaf.requires_grad]
    eager = adapted_linear(x, weight, bias, [(Factors(*factors), 0.3)], False, kernel)  # type: ignore[arg-type]
    expected = torch.autograd.grad(eager.square().sum(), leaves)
    actual = linear(x, weight, bias, factors, [0.3], False, torch.float32, kernel, True)
    torch.testing.assert_close(actual, eager)
    for a, b in zip(torch.autograd.grad(actual.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_layer_keeps_no_weight_of_its_own() -> None:
    x, weight, bias, factors = layer(torch.bfloat16)
    kept: list[torch.Tensor] = []

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: torch.Tensor, bias: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return adapted_linear(x, weight, bias, [(Factors(*factors), 0.3)], False)

    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = run(x, bias, *factors)
    assert kept
    allowed = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, bias, *factors)}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= allowed
    y.float().sum().backward()
    assert all(factor.grad is not None for factor in factors)
