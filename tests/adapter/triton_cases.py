"""The GPU kernels against the specification in factors.py, in float64.

Not collected by itself: test_triton_kernels.py runs it with Triton's interpreter, and on a card if there is one.
"""

from __future__ import annotations

import pytest
import torch

from abba_cli.adapter import factors as spec
from abba_cli.adapter import triton_kernels as kernels
from abba_cli.adapter.factors import Factors
from abba_cli.adapter.triton_tiles import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(1, 2, 1, 1), (9, 14, 2, 3), (70, 134, 16, 5), (131, 66, 33, 32)]  # m, n, r1, r2: around one tile and more
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def surrounded(values: torch.Tensor) -> torch.Tensor:
    """The same values as a view with odd strides, among NaN that spoils whatever is read from outside of it."""
    m, n = values.shape
    room = torch.full((2 * m + 2, n + 5), torch.nan, dtype=values.dtype, device=DEVICE)
    view = room[1 : 2 * m + 1 : 2, 3 : n + 3]
    view.copy_(values)
    return view


def random(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return surrounded(torch.randn(shape).to(dtype))


def factors_of(m: int, n: int, r1: int, r2: int, dtype: torch.dtype = F32) -> Factors:
    return Factors(*(random(*shape, dtype=dtype) for shape in ((m, r1), (r1, n), (m, r2), (r2, n))))


def delta(factors: Factors, s: float) -> torch.Tensor:
    return spec.delta_weight(Factors(*(factor.double() for factor in factors)), s)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Errors are measured against the largest entry, since small entries are differences of large ones."""
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) <= relative


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "factor_dtype", "transposed"), [(F32, F32, False), (BF16, F32, True), (F16, BF16, False)])
def test_add_delta(shape: tuple[int, int, int, int], dtype: torch.dtype, factor_dtype: torch.dtype, transposed: bool) -> None:
    m, n, *_ = shape
    factors, W0 = factors_of(*shape, dtype=factor_dtype), random(m, n, dtype=dtype)
    expected = W0.double() + delta(factors, 0.7)
    weight = surrounded(W0.T) if transposed else W0
    exact = kernels.add_delta(weight, [(factors, 0.7)], transposed, F32)
    assert_near(exact.T if transposed else exact, expected, 1e-6)
    rounded = kernels.add_delta(weight, [(factors, 0.7)], transposed, dtype)
    assert rounded.dtype == dtype
    assert rounded.is_contiguous()
    if INTERPRETED and dtype == BF16:  # Triton 3.9's interpreter cuts bfloat16 off instead of rounding
        torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)
    else:
        assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("with_weight", [False, True])
def test_add_delta_sums_adapters_before_it_rounds(with_weight: bool) -> None:
    adapters = [(factors_of(21, 35, 3, 2), 300.0), (factors_of(21, 35, 4, 17), -0.2), (factors_of(21, 35, 1, 2), 0.9)]
    W0 = random(21, 35, dtype=F16) if with_weight else None
    expected = sum((delta(*one) for one in adapters), torch.zeros(21, 35, device=DEVICE).double() if W0 is None else W0.double())
    actual = kernels.add_delta(W0, adapters, False, F16)
    # Half a unit in the last place, and what float32 adds to it; a rounded sum in between would cost up to three halves.
    assert bool(((actual.double() - expected).abs() <= expected.abs() * 2**-11 * 1.01 + 3e-3).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    factors, W0 = factors_of(70, 65, 5, 3), random(70, 65, dtype=dtype)
    factors.B2.zero_()
    assert torch.equal(kernels.add_delta(W0, [(factors, 3.0)], False, dtype), W0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "factor_dtype", "transposed"), [(F32, F32, False), (BF16, F32, True), (F16, BF16, False)])
def test_contract(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    transposed: bool,
) -> None:
    monkeypatch.setattr(kernels, "COLUMNS_PER_PART", 64)  # several parts of a small matrix
    m, n, *_ = shape
    factors, G = factors_of(*shape, dtype=factor_dtype), random(m, n, dtype=dtype)
    leaves = Factors(*(factor.double().requires_grad_() for factor in factors))
    expected = torch.autograd.grad((G.double() * spec.delta_weight(leaves, 0.7)).sum(), leaves)
    actual = kernels.contract(surrounded(G.T).T if transposed else G, factors, 0.7)
    # The interpreter knows no TF32.
    tolerance = 1e-2 if factor_dtype == BF16 else 1e-6 if dtype == F32 or INTERPRETED else 2e-3
    for ours, reference, factor in zip(actual, expected, factors, strict=True):
        assert ours.dtype == factor.dtype
        assert ours.is_contiguous()
        assert_near(ours, reference, tolerance)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("m", "n", "blocksize"), [(9, 14, 64), (70, 134, 64), (33, 256, 128)])
@pytest.mark.parametrize("count", [1, 2], ids=["one adapter", "two adapters"])
def test_dequantize_4bit(kind: str, m: int, n: int, blocksize: int, count: int) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(m, n, device=DEVICE), blocksize=blocksize, quant_type=kind)
    W0 = functional.dequantize_4bit(packed, state)
    adapters = [(factors_of(m, n, 2 + i, 17), 0.3) for i in range(count)]
    expected = sum((delta(*one) for one in adapters), W0.double())
    arguments = (packed, state.absmax, state.code, blocksize, (m, n))
    assert_near(kernels.dequantize_4bit(*arguments, adapters, F32), expected, 1e-6)
    rounded = kernels.dequantize_4bit(*arguments, adapters, F16)
    assert torch.equal(rounded, kernels.dequantize_4bit(*arguments, adapters, F32).to(F16))
    for factors, _ in adapters:
        factors.B2.zero_()
    assert torch.equal(kernels.dequantize_4bit(*arguments, adapters, F32), W0)
    # A storage dtype such as FSDP needs.
    if packed.numel() % 2 == 0:
        arguments = (packed.view(-1).view(BF16), *arguments[1:])
        assert torch.equal(kernels.dequantize_4bit(*arguments, adapters, F32), W0)


def test_supported() -> None:
    one, odd, wide = factors_of(4, 6, 2, 3), factors_of(4, 5, 2, 3), factors_of(4, 6, 2, kernels.MAX_RANK + 1)
    W0, packed = random(4, 6, dtype=BF16), torch.zeros(12, 1, dtype=torch.uint8, device=DEVICE)
    half = Factors(*(factor.half() for factor in one))
    mixed = one._replace(A1=one.A1.bfloat16())
    assert kernels.supported(W0, [(one, 1.0), (one, 2.0)], BF16)
    assert kernels.supported(None, [(one, 1.0)], F32)
    assert kernels.supported(packed, [(one, 1.0)], F16)
    assert kernels.supported(None, [(odd, 1.0)], F32)
    assert not kernels.supported(packed, [(odd, 1.0)], F16)
    assert not kernels.supported(W0, [], BF16)
    assert not kernels.supported(W0.double(), [(one, 1.0)], F32)
    assert not kernels.supported(W0, [(one, 1.0)], torch.float64)
    assert not kernels.supported(W0.to("meta"), [(one, 1.0)], BF16)
    for factors in (wide, half, mixed):
        assert not kernels.supported(W0, [(one, 1.0), (factors, 1.0)], BF16)
