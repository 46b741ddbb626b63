"""The specification itself, against loops, the paper's identities and `torch.linalg.svd`."""

from __future__ import annotations

import math

import pytest
import torch

from abba_cli.adapter import factors as F
from abba_cli.adapter.factors import Factors


def random_factors(m: int = 7, n: int = 11, r1: int = 3, r2: int = 5, dtype: torch.dtype = torch.float64) -> Factors:
    return Factors(*(torch.randn(shape, dtype=dtype) for shape in ((m, r1), (r1, n), (m, r2), (r2, n))))


def spectrum(m: int, n: int, decay: float) -> torch.Tensor:
    """A float64 matrix with singular values k^-decay."""
    U, S, Vh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    return U * torch.arange(1, S.numel() + 1, dtype=S.dtype) ** -decay @ Vh


def test_delta_weight_is_the_formula_entry_by_entry() -> None:
    f, s = random_factors(), 0.7
    delta = F.delta_weight(f, s)
    assert delta.shape == (7, 11)
    for i in range(7):
        for j in range(11):
            first = sum(f.B1[i, k] * f.A1[k, j] for k in range(3))
            second = sum(f.B2[i, k] * f.A2[k, j] for k in range(5))
            assert delta[i, j] == pytest.approx(float(s * first * second), rel=1e-10)


def test_khatri_rao_has_the_papers_index_order() -> None:
    f = random_factors()
    B_kr, A_kr = F.khatri_rao(f)
    assert B_kr.shape == (7, 15)
    assert A_kr.shape == (15, 11)
    for k1 in range(3):
        for k2 in range(5):
            assert torch.equal(B_kr[:, k1 * 5 + k2], f.B1[:, k1] * f.B2[:, k2])
            assert torch.equal(A_kr[k1 * 5 + k2], f.A1[k1] * f.A2[k2])


def test_khatri_rao_makes_abba_a_lora_of_rank_r1_times_r2() -> None:
    f, s = random_factors(m=40, n=37), 1.3
    B_kr, A_kr = F.khatri_rao(f)
    delta = F.delta_weight(f, s)
    torch.testing.assert_close(s * B_kr @ A_kr, delta)
    assert torch.linalg.matrix_rank(delta) == 15
    x = torch.randn(2, 4, 37, dtype=torch.float64)
    torch.testing.assert_close(F.forward(x, f, s), s * (x @ A_kr.T) @ B_kr.T)


# method.md's table of alpha and s at r1 = r2 = 16, which prints irrational alphas rounded.
@pytest.mark.parametrize(("alpha", "s"), [(4, 1), (8, 4), (128**0.5, 8), (16, 16), (32, 64), (64, 256)])
def test_scale_of_the_paper(alpha: float, s: float) -> None:
    assert F.scale(alpha, 16, 16) == pytest.approx(s)


def test_scale_uses_both_ranks() -> None:
    assert F.scale(6.0, 4, 9) == pytest.approx(6.0)
    assert F.scale(6.0, 9, 4) == pytest.approx(6.0)


def test_A2_is_uniform_within_kaimings_bound() -> None:
    A2 = F.init_A2(50, 331)
    bound = math.sqrt(6 / 331)
    assert A2.abs().max() <= bound
    assert A2.abs().max() > 0.999 * bound
    assert A2.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("shape", [(13, 29), (301, 253), (253, 301)])  # the first is small enough for the exact SVD
def test_svd_init_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = spectrum(*shape, decay=1.0)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    B1, A1 = F.svd_init(weight.float(), 6)
    assert B1.dtype == A1.dtype == torch.float32
    torch.testing.assert_close(B1.double() @ A1.double(), U[:, :6] * S[:6] @ Vh[:6], atol=1e-5, rtol=0)
    # sqrt(S) on either side
    torch.testing.assert_close(B1.T @ B1, torch.diag(S[:6]).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(A1 @ A1.T, torch.diag(S[:6]).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [5, 16, 30])
@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, None), (0.5, 1e-5)])
def test_svd_init_error_is_nearly_the_best_possible(rank: int, decay: float, tolerance: float | None) -> None:
    weight = torch.randn(420, 290, dtype=torch.float64) if tolerance is None else spectrum(420, 290, decay)
    best = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    B1, A1 = F.svd_init(weight.float(), rank)
    error = torch.linalg.norm(weight - B1.double() @ A1.double())
    assert best <= error * (1 + 1e-9)
    assert error <= best * (1 + (tolerance or 2e-3))


def test_svd_init_depends_on_the_weight_and_the_seed_only() -> None:
    weight = torch.randn(250, 211)
    torch.manual_seed(5)
    first = F.svd_init(weight, 4)
    torch.rand(1000)
    state = torch.get_rng_state()
    second = F.svd_init(weight, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    other = F.svd_init(weight, 4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(F.svd_init(weight, 4, seed=5)[0], first[0])


def test_svd_init_accepts_a_rank_above_the_size_of_the_layer() -> None:
    weight = torch.randn(6, 9)
    B1, A1 = F.svd_init(weight, 10)
    assert B1.shape == (6, 10)
    assert A1.shape == (10, 9)
    torch.testing.assert_close(B1 @ A1, weight)
    # Columns without a singular vector add nothing now, and can be trained: their rows of A1 are not zero.
    assert not B1[:, 6:].any()
    assert A1[6:].any(dim=1).all()
    assert A1[6:].abs().max() <= 1 / 3
    torch.testing.assert_close(A1, F.svd_init(weight, 10)[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_svd_init_is_in_float32_for_low_precision_weights(dtype: torch.dtype, expected: torch.dtype) -> None:
    weight = torch.randn(20, 12).to(dtype)
    before = weight.clone()
    B1, A1 = F.svd_init(weight, 12)
    assert B1.dtype == A1.dtype == expected
    assert torch.equal(weight, before)
    torch.testing.assert_close(B1 @ A1, weight.to(expected))


def test_random_pair_is_like_a_fresh_linear_layer() -> None:
    B, A = F.init_pair((400, 16), (16, 300))
    assert B.abs().max() <= 1 / 4
    assert A.abs().max() <= 1 / math.sqrt(300)
    # variance r * (1 / 3r) * (1 / 3n)
    assert (B @ A).std() == pytest.approx(1 / (3 * math.sqrt(300)), rel=0.1)
