"""The choice of a way of computing: what a user asks for is kept, and the extremes go where they must."""

from __future__ import annotations

import pytest
import torch

from abba_cli.adapter import cost
from abba_cli.adapter.cost import Shape, Way, choose

CPU = torch.device("cpu")


def shape(T: int, m: int, n: int, r: int = 16, size: int = 2, shared: bool = True, training: bool = True) -> Shape:
    return Shape(T, m, n, ((r, r),), size, shared, training)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kernel", ["factored", "effective"])
@pytest.mark.parametrize("T", [1, 1024, 16384])
def test_what_was_asked_for_is_used(T: int, kernel: str, device: str) -> None:
    way = choose(shape(T, 576, 1536), kernel, torch.device(device))  # type: ignore[arg-type]
    assert way.effective == (kernel == "effective")


def test_one_token_through_a_wide_layer_makes_no_weight() -> None:
    assert not choose(shape(1, 4096, 4096, r=4, training=False), "auto", CPU).effective


def test_many_tokens_share_the_weight() -> None:
    assert choose(shape(2048, 1536, 576), "auto", CPU).effective


def test_gradients_of_a_wide_layer_with_small_ranks_go_through_the_khatri_rao_factors() -> None:
    """Per token G takes mn products, the other way 2 R (m + n): here 16.8 million against half a million."""
    assert not choose(shape(2048, 4096, 4096, r=4), "auto", CPU).dense
    # With R = 2304 the comparison turns: 16.8 million again, against 37.7 million.
    assert choose(shape(2048, 4096, 4096, r=48), "auto", CPU).dense


def test_an_update_of_its_own_pays_for_its_product() -> None:
    """Without the base's product to share (dropout, other tuners), the effective weight costs T m n more in each direction."""
    device = cost.profile("cpu")
    shared, alone = shape(1024, 4096, 4096, r=4), shape(1024, 4096, 4096, r=4, shared=False)
    for dense in (True, False):
        way = Way(effective=True, dense=dense)
        assert cost.seconds(alone, way, device) > 1.3 * cost.seconds(shared, way, device)
    assert not choose(alone, "auto", CPU).effective


def test_auto_is_never_dearer_than_what_can_be_asked_for() -> None:
    device = cost.profile("cpu")
    for T in (1, 64, 1024, 8192):
        for m, n in ((192, 576), (1536, 576), (4096, 4096), (14336, 4096)):
            for r in (2, 16, 32):
                one = shape(T, m, n, r)
                best = cost.seconds(one, choose(one, "auto", CPU), device)
                assert all(best <= cost.seconds(one, Way(e, d), device) for e in (True, False) for d in (True, False))
