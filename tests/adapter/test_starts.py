"""The starts of the paper's ablation, against numpy's singular values."""

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from abba_cli.adapter import AbbaConfig
from abba_cli.adapter.starts import AWAY_FROM_BASE, STARTS


def started(start: str, r1: int = 3, r2: int = 2) -> tuple[np.ndarray, dict[str, np.ndarray], nn.Module]:
    torch.manual_seed(1)
    layer = nn.Sequential()
    layer.add_module("one", nn.Linear(7, 11))
    weight = layer.get_submodule("one").weight.detach().double().numpy().copy()
    model = get_peft_model(layer, AbbaConfig(r1=r1, r2=r2, alpha=2.0, target_modules=["one"], init_weights=start))
    found = {name.split(".")[-2][5:]: one.detach().double().numpy() for name, one in model.named_parameters() if "abba_" in name}
    return weight, found, model


def best(weight: np.ndarray, first: int, count: int) -> np.ndarray:
    """The part of a matrix in its singular directions first ... first + count - 1."""
    U, S, Vh = np.linalg.svd(weight)
    part = slice(first, first + count)
    return (U[:, part] * S[part]) @ Vh[part]


@pytest.mark.parametrize("start", STARTS)
def test_the_pairs_are_what_they_are_called(start: str) -> None:
    weight, factors, model = started(start)
    P1, P2 = factors["B1"] @ factors["A1"], factors["B2"] @ factors["A2"]
    root = np.sqrt(np.abs(weight))
    expected = {
        "svd": (best(weight, 0, 3), np.zeros_like(weight)),
        "random": (P1, np.zeros_like(weight)),
        "swapped": (np.zeros_like(weight), best(weight, 0, 2)),
        "zeros": (np.zeros_like(weight), np.zeros_like(weight)),
        "ones": (best(weight, 0, 3), np.ones_like(weight)),
        "roots": (best(np.sign(weight) * root, 0, 3), best(root, 0, 2)),
        "top_next": (best(weight, 0, 3), best(weight, 3, 2)),
        "next_top": (best(weight, 2, 3), best(weight, 0, 2)),
    }[start]
    np.testing.assert_allclose(P1, expected[0], atol=1e-5)
    np.testing.assert_allclose(P2, expected[1], atol=1e-5)
    assert (np.abs(P1 * P2).max() > 1e-3) == (start in AWAY_FROM_BASE)
    np.testing.assert_array_equal(weight, model.get_base_model().one.base_layer.weight.detach().double().numpy())  # W0 is kept


def test_what_is_zero_on_one_side_can_still_learn() -> None:
    """Where both B are zero nothing does, as the paper says."""
    for start in STARTS:
        _, _, model = started(start)
        model(torch.randn(5, 7)).square().sum().backward()
        moving = [name for name, one in model.named_parameters() if "abba_" in name and one.grad is not None and one.grad.any()]
        assert bool(moving) == (start != "zeros"), start


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
def test_the_exponent_of_the_scale(exponent: float) -> None:
    config = AbbaConfig(r1=3, r2=5, alpha=2.0, scale_exponent=exponent, target_modules=["one"], init_weights=False)
    layer = nn.Sequential()
    layer.add_module("one", nn.Linear(7, 11))
    model = get_peft_model(layer, config)
    one = model.get_base_model().one
    B1, A1, B2, A2 = (factor.detach() for factor in one.factors("default"))
    expected = 4.0 / math.pow(15, exponent) * (B1 @ A1) * (B2 @ A2)
    torch.testing.assert_close(one.get_delta_weight("default").detach(), expected)
    one.set_scale("default", 3.0)
    torch.testing.assert_close(one.get_delta_weight("default").detach(), 3 * expected)
