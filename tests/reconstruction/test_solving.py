"""The solvers against what must hold for any least-squares solution, and against matrices whose factors are known."""

import itertools
import math

import pytest
import torch
from peft import LoHaConfig, get_peft_model

from abba_cli.adapter.factors import Factors, delta_weight
from abba_cli.reconstruction.experiment import split
from abba_cli.reconstruction.matrices import SYNTHETIC, synthetic
from abba_cli.reconstruction.solving import (
    adam,
    alternating_least_squares,
    lora_errors,
    relative_error,
    solve_rows,
)
from abba_cli.reconstruction.starts import Start, abba_start, draw

STARTS: tuple[Start, ...] = ("svd", "root", "training", "random", "loha")
M, N = 23, 17  # no sides alike, none divisible by 8
RANKS = [(2, 3), (3, 2), (1, 4), (4, 4)]


def matrix(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, N, generator=generator, dtype=torch.float64)


def factors(r1: int, r2: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(*(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((M, r1), (r1, N), (M, r2), (r2, N))))


def normed(one: torch.Tensor) -> torch.Tensor:
    return one / one.square().mean().sqrt()


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_lora_errors_are_those_of_the_truncated_svd(kind: str) -> None:
    one = synthetic(kind, 37, seed=1).double()
    U, S, Vh = torch.linalg.svd(one)
    for rank, error in zip((1, 5, 37), lora_errors(one, [1, 5, 37]), strict=True):
        left = one - (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert error == pytest.approx((left.square().sum() / one.square().sum()).item(), abs=1e-12)


@pytest.mark.parametrize(("r1", "r2"), RANKS)
def test_the_solution_for_one_factor_has_no_gradient(r1: int, r2: int) -> None:
    one, (B1, A1, B2, A2) = matrix(), factors(r1, r2)
    W = B2 @ A2
    solved = solve_rows(one, W, A1, B1).requires_grad_()
    (one - W * (solved @ A1)).square().sum().backward()
    assert solved.grad is not None
    assert solved.grad.norm() < 1e-9 * one.norm()
    # The reference: one small problem a row, by another solver.
    for row in range(M):
        expected = torch.linalg.lstsq((A1 * W[row]).T, one[row, :, None]).solution[:, 0]
        torch.testing.assert_close(solved.detach()[row], expected, rtol=1e-6, atol=1e-9)


def test_what_a_zero_row_leaves_open_stays() -> None:
    one, (B1, A1, B2, A2) = matrix(), factors(2, 3)
    B2[4] = 0
    solved = solve_rows(one, B2 @ A2, A1, B1)
    torch.testing.assert_close(solved[4], B1[4])
    assert not torch.allclose(solved[5], B1[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SYNTHETIC)
def test_errors_never_rise_and_are_those_of_the_factors(kind: str, dtype: torch.dtype) -> None:
    one = normed(synthetic(kind, 37, seed=1)[:, :29].to(dtype))
    for start, (r1, r2) in itertools.product(STARTS, [(2, 3), (4, 4)]):
        begun = draw(start, one, r1, r2, seed=3)
        solution = alternating_least_squares(one, begun, most_sweeps=40)
        assert all(later < earlier for earlier, later in itertools.pairwise(solution.errors)), start
        assert solution.error == relative_error(one, solution.factors)
        assert solution.errors[0] == relative_error(one, begun)
        assert solution.error < min(1.0, solution.errors[0]), start
        assert [tuple(f.shape) for f in solution.factors] == [(37, r1), (r1, 29), (37, r2), (r2, 29)]


@pytest.mark.parametrize(("r1", "r2"), RANKS)
def test_a_product_of_true_factors_is_found_again(r1: int, r2: int) -> None:
    true = factors(r1, r2, seed=5)
    one = delta_weight(true, 1.0)
    away = Factors(*(each + 0.2 * other for each, other in zip(true, factors(r1, r2, seed=6), strict=True)))
    assert relative_error(one, away) > 0.1
    assert alternating_least_squares(one, away, tolerance=0, most_sweeps=1000).error < 1e-12


@pytest.mark.parametrize("start", ["svd", "root", "random"])
def test_true_factors_are_found_from_far_away(start: Start) -> None:
    """For r1 = 1 from everywhere; for larger ranks there are other minima, which is what restarts are for."""
    one = normed(delta_weight(factors(1, 3, seed=5), 1.0))
    assert alternating_least_squares(one, draw(start, one, 1, 3, seed=0)).error < 1e-12


def test_a_fixed_point_has_no_gradient_in_any_factor() -> None:
    true = factors(3, 2, seed=5)
    product = delta_weight(true, 1.0)
    one = product + 0.1 * matrix()
    found = alternating_least_squares(one, true, tolerance=0, most_sweeps=2000)
    assert 0 < found.error < found.errors[0]
    free = Factors(*(each.requires_grad_() for each in found.factors))
    ((one - delta_weight(free, 1.0)).square().sum() / one.square().sum()).backward()
    for each in free:
        assert each.grad is not None
        # Times the factor, as pairs may trade their sizes.
        assert (each.grad * each.detach()).abs().max() < 1e-7


def test_adam_ends_near_least_squares() -> None:
    one = normed(synthetic("sparse", 40, seed=2))
    start = draw("svd", one, 3, 3, seed=0)
    followed = adam(one, start, steps=800)
    assert len(followed.errors) == 801
    assert followed.error == relative_error(one, followed.factors)
    assert followed.error == pytest.approx(alternating_least_squares(one, start).error, rel=0.05)
    assert start.B1.grad is None


def test_more_rank_holds_more_than_lora_of_the_same_parameters() -> None:
    """On an orthogonal matrix every singular value is alike, so that LoRA holds rank / size of it and no more."""
    one = normed(synthetic("orthogonal", 64, seed=0))
    found = alternating_least_squares(one, draw("svd", one, 8, 8, seed=0))
    assert lora_errors(one, [16]) == [pytest.approx(0.75)]
    assert found.error < 0.5


@pytest.mark.parametrize("rank", range(2, 12))
def test_budgets_are_equal(rank: int) -> None:
    r1, r2 = split(rank)
    one = matrix()
    begun = draw("svd", one, r1, r2, seed=0)
    assert sum(each.numel() for each in begun) == rank * (M + N)
    assert 0 <= r2 - r1 <= 1


def test_starts_come_from_their_seed_alone() -> None:
    one = normed(matrix())
    state = torch.get_rng_state()
    for start in STARTS:
        first, again, other = (draw(start, one, 3, 2, seed) for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True)), start
        assert {each.dtype for each in first} == {torch.float64}
    assert torch.equal(state, torch.get_rng_state())
    assert [abba_start(restart) for restart in range(5)] == ["svd", "root", "training", "random", "random"]


def test_the_random_start_is_as_large_as_the_matrix() -> None:
    one = torch.zeros(300, 200)
    product = delta_weight(draw("random", one, 3, 4, seed=0), 1.0)
    assert product.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.2)


def test_the_loha_start_is_peft_s() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(400, 300, bias=False))
    torch.manual_seed(0)
    model = get_peft_model(layer, LoHaConfig(r=5, target_modules=["0"]))
    peft = [
        dict(model.named_parameters())[f"base_model.model.0.hada_{name}.default"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    ]
    ours = draw("loha", torch.zeros(300, 400), 5, 5, seed=1)
    for theirs, mine in zip(peft, ours, strict=True):
        assert theirs.shape == mine.shape
        assert theirs.abs().max().item() == pytest.approx(mine.abs().max().item(), rel=0.02)
        assert theirs.std().item() == pytest.approx(mine.std().item(), rel=0.1)
    assert not ours.A2.any()


def test_the_training_start_changes_nothing_yet() -> None:
    one = normed(matrix())
    begun = draw("training", one, 3, 2, seed=0)
    assert not delta_weight(begun, 1.0).any()
    left = one - begun.B1 @ begun.A1
    assert (left.norm() / one.norm()).item() == pytest.approx(math.sqrt(lora_errors(one, [3])[0]), abs=1e-9)
