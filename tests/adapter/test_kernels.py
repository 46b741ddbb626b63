"""The fast kernels against the specification in factors.py: values, gradients, dtypes, and what they keep."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from abba_cli.adapter import dense, kernels, passes
from abba_cli.adapter import factors as spec
from abba_cli.adapter.cost import Way
from abba_cli.adapter.dense import Scaled
from abba_cli.adapter.factors import Factors

M, N = 9, 13


@pytest.fixture(params=[(True, True), (True, False), (False, False), (False, True)], ids=["E-G", "E-KR", "KR-KR", "KR-G"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one of the ways of computing: forward through W0 + dW or not, gradients through G or not."""
    effective, by_G = request.param
    monkeypatch.setattr(passes, "choose", lambda *args: Way(effective, by_G))
    return str(request.param)


def adapter(r1: int, r2: int, s: float, dtype: torch.dtype = torch.float64, m: int = M, n: int = N) -> Scaled:
    shapes = ((m, r1), (r1, n), (m, r2), (r2, n))
    return Factors(*(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)), s


def tensors(adapters: list[Scaled]) -> list[torch.Tensor]:
    return [factor for factors, _ in adapters for factor in factors]


def rebuild(flat: tuple[torch.Tensor, ...], scales: list[float]) -> list[Scaled]:
    return [(Factors(*flat[4 * i : 4 * i + 4]), s) for i, s in enumerate(scales)]


@pytest.mark.parametrize("scales", [[0.7], [0.7, -1.2]], ids=["one adapter", "two adapters"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck_adapted_linear(way: str, transposed: bool, with_bias: bool, scales: list[float]) -> None:
    adapters = [adapter(2 + i, 3, s) for i, s in enumerate(scales)]
    x = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    weight = torch.randn((N, M) if transposed else (M, N), dtype=torch.float64)
    bias = torch.randn(M, dtype=torch.float64, requires_grad=True) if with_bias else None

    def run(x: torch.Tensor, bias: torch.Tensor | None, *flat: torch.Tensor) -> torch.Tensor:
        return kernels.adapted_linear(x, weight, bias, rebuild(flat, scales), transposed)

    assert gradcheck(run, (x, bias, *tensors(adapters)))


@pytest.mark.parametrize("scales", [[0.7], [0.7, -1.2]], ids=["one adapter", "two adapters"])
def test_gradcheck_delta_linear(way: str, scales: list[float]) -> None:
    adapters = [adapter(2, 3 + i, s) for i, s in enumerate(scales)]
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        return kernels.delta_linear(x, rebuild(flat, scales), torch.float64)

    assert gradcheck(run, (x, *tensors(adapters)))


@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N), (0, N)])
def test_agrees_with_the_specification(way: str, shape: tuple[int, ...]) -> None:
    (factors, s), x = adapter(3, 5, 0.4, torch.float32), torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(M, N), torch.randn(M)
    expected = x @ weight.T + bias + spec.forward(x, factors, s)
    expected_grads = torch.autograd.grad(expected.square().sum(), (x, *factors))
    actual = kernels.adapted_linear(x, weight, bias, [(factors, s)], transposed=False)
    actual_grads = torch.autograd.grad(actual.square().sum(), (x, *factors))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        kernels.delta_linear(x, [(factors, s)], x.dtype), x @ spec.delta_weight(factors, s).T, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, None])
def test_low_precision_base(way: str, dtype: torch.dtype, factor_dtype: torch.dtype | None) -> None:
    factors, s = adapter(3, 5, 0.1, factor_dtype or dtype)
    x = torch.randn(40, N, dtype=dtype, requires_grad=True)
    weight = torch.randn(M, N, dtype=dtype)
    y = kernels.adapted_linear(x, weight, None, [(factors, s)], transposed=False)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == dtype
    assert all(factor.grad.dtype == (factor_dtype or dtype) for factor in factors)

    exact = Factors(*(factor.detach().double().requires_grad_() for factor in factors))
    x64 = x.detach().double().requires_grad_()
    y64 = x64 @ weight.double().T + spec.forward(x64, exact, s)
    y64.sum().backward()
    # A bound on the norm: rounding to 8 bits makes single entries that cancel meaningless.
    for a, b in [(y, y64), (x.grad, x64.grad), *((f.grad, e.grad) for f, e in zip(factors, exact, strict=True))]:
        assert torch.linalg.norm(a.double() - b) < 0.02 * torch.linalg.norm(b)


def test_effective_weight_is_rounded_once() -> None:
    factors, s = adapter(3, 5, 0.01, torch.float32)
    weight = torch.randn(M, N, dtype=torch.bfloat16)
    expected = (weight.float() + spec.delta_weight(factors, s)).bfloat16()
    assert torch.equal(dense.effective_weight(weight, [(factors, s)]), expected)
    stored = dense.effective_weight(weight.T.contiguous(), [(factors, s)], transposed=True)
    torch.testing.assert_close(stored.T, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_inside_autocast(way: str, transposed: bool) -> None:
    factors, s = adapter(3, 5, 0.3, torch.float32)
    x = torch.randn(6, N, requires_grad=True)
    weight = torch.randn((N, M) if transposed else (M, N))
    bias = torch.randn(M, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.adapted_linear(x, weight, bias, [(factors, s)], transposed)
        y.sum().backward()  # some training loops leave the region only afterwards
    assert y.dtype == torch.bfloat16
    for leaf in (x, bias, *factors):
        assert leaf.grad.dtype == torch.float32
    expected = x @ (weight if transposed else weight.T) + bias + spec.forward(x, factors, s)
    assert torch.linalg.norm(y.float() - expected) < 0.02 * torch.linalg.norm(expected)


def test_autocast_leaves_float64_alone(way: str) -> None:
    factors, s = adapter(3, 5, 0.3)
    x, weight = torch.randn(6, N, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.adapted_linear(x, weight, None, [(factors, s)], transposed=False)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [True, False], ids=["adapted_linear", "delta_linear"])
def test_keeps_only_x_the_weight_and_the_factors_for_backward(way: str, base: bool, dtype: torch.dtype) -> None:
    adapters = [adapter(3, 5, 0.3, torch.float32), adapter(2, 2, 0.3, torch.float32)]
    x = torch.randn(50, N, dtype=dtype, requires_grad=True)
    weight = torch.randn(M, N, dtype=dtype)
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if base:
            kernels.adapted_linear(x, weight, None, adapters, transposed=False)
        else:
            kernels.delta_linear(x, adapters, dtype)
    allowed = {t.untyped_storage().data_ptr() for t in (x, weight, *tensors(adapters))}
    assert kept
    assert {t.untyped_storage().data_ptr() for t in kept} <= allowed


def test_frozen_inputs_get_no_gradient(way: str) -> None:
    factors, s = adapter(3, 5, 0.3, torch.float32)
    factors.B1.requires_grad_(False)
    factors.A2.requires_grad_(False)
    x, weight = torch.randn(50, N), torch.randn(M, N)
    kernels.adapted_linear(x, weight, None, [(factors, s)], transposed=False).sum().backward()
    assert x.grad is None
    assert factors.B1.grad is None
    assert factors.A2.grad is None
    reference = Factors(*(factor.detach().clone().requires_grad_() for factor in factors))
    spec.forward(x, reference, s).sum().backward()
    torch.testing.assert_close(factors.A1.grad, reference.A1.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(factors.B2.grad, reference.B2.grad, atol=1e-4, rtol=1e-4)


def test_zero_B2_changes_no_bit(way: str) -> None:
    factors, s = adapter(3, 5, 0.3, torch.float32)
    factors.B2.data.zero_()
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = torch.randn(50, N).to(dtype), torch.randn(M, N).to(dtype), torch.randn(M).to(dtype)
        y = kernels.adapted_linear(x, weight, bias, [(factors, s)], transposed=False)
        assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
