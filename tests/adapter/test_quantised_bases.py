"""bitsandbytes bases, in 4 and 8 bits, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker
from peft import PeftModel, get_peft_model
from test_adapter_model import abba_layers, config, logits, train
from torch import nn
from transformers import PreTrainedModel

from abba_cli.adapter import AbbaLayer

QuantisedMaker = Callable[[], PreTrainedModel]

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no build for this platform")


@pytest.fixture(params=["4bit", "8bit"])
def quantised(request: pytest.FixtureRequest, tiny: ModelMaker) -> QuantisedMaker:
    def make() -> PreTrainedModel:
        # bitsandbytes repacks its 4-bit weights for the CPU in blocks of 32 rows and 64 columns.
        model = tiny(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, num_attention_heads=2)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, quantise(module, request.param))
        return model.requires_grad_(False)

    return make


def quantise(linear: nn.Linear, kind: str) -> nn.Module:
    args = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    if kind == "4bit":
        new = bnb.nn.Linear4bit(*args, bias=bias, quant_type="nf4", compute_dtype=torch.bfloat16)
    else:
        new = bnb.nn.Linear8bitLt(*args, bias=bias, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def dequantised(layer: AbbaLayer) -> torch.Tensor:
    return layer.get_base_weight().float()


def test_a_fresh_adapter_changes_no_bit(quantised: QuantisedMaker, ids: torch.Tensor) -> None:
    expected = logits(quantised(), ids)
    model = get_peft_model(quantised(), config())
    assert {type(layer.get_base_layer()).__name__ for layer in abba_layers(model).values()} <= {
        "Linear4bit",
        "Linear8bitLt",
    }
    assert torch.equal(logits(model, ids), expected)


def test_a_fresh_adapter_changes_no_bit_in_evaluation(quantised: QuantisedMaker, ids: torch.Tensor) -> None:
    base = quantised().eval()
    expected = logits(base, ids)
    model = get_peft_model(base, config()).eval()
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(get_peft_model(quantised().eval(), config()), ids), expected)


def test_training_after_an_evaluation(quantised: QuantisedMaker, ids: torch.Tensor) -> None:
    """Where the CPU has AVX512-BF16, an evaluation makes bitsandbytes lose the gradient of its 4-bit layers."""

    def gradients(evaluate: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(quantised(), config(init_weights=False, alpha=1.0))
        if evaluate:
            model.eval()
            logits(model, ids)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, actual = gradients(False), gradients(True)
    for name, gradient in expected.items():
        assert torch.linalg.norm(actual[name] - gradient) < 0.05 * torch.linalg.norm(gradient), name


def test_reading_the_weight_after_an_evaluation(quantised: QuantisedMaker, ids: torch.Tensor) -> None:
    model = get_peft_model(quantised(), config(init_weights="random"))
    layers = abba_layers(model).values()
    before = [dequantised(layer) for layer in layers]
    model.eval()
    logits(model, ids)
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(dequantised(layer), weight, atol=0.01 * weight.abs().max().item(), rtol=0)


def test_the_svd_is_of_the_dequantised_weight(quantised: QuantisedMaker) -> None:
    for layer in abba_layers(get_peft_model(quantised(), config())).values():
        B1, A1, B2, A2 = layer.factors("default")
        U, S, Vh = torch.linalg.svd(dequantised(layer), full_matrices=False)
        torch.testing.assert_close(B1 @ A1, U[:, :3] * S[:3] @ Vh[:3], atol=1e-4, rtol=0)
        assert {factor.dtype for factor in (B1, A1, B2, A2)} == {torch.float32}


def test_forward_is_the_base_plus_the_update(quantised: QuantisedMaker) -> None:
    model = get_peft_model(quantised(), config(init_weights=False))
    for layer in abba_layers(model).values():
        x = torch.randn(2, 30, layer.in_features, dtype=torch.bfloat16)
        expected = layer.base_layer(x).float() + x.float() @ layer.get_delta_weight("default").T
        actual = layer(x)
        assert actual.dtype == torch.bfloat16
        assert torch.linalg.norm(actual.float() - expected) < 0.02 * torch.linalg.norm(expected)


def test_trains_saves_and_loads(quantised: QuantisedMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(quantised(), config())
    losses = train(model, ids, steps=8, lr=2e-2)
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised().eval(), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_merge_and_unmerge(quantised: QuantisedMaker, ids: torch.Tensor) -> None:
    """The merged weight is quantised again, so all comparisons are up to a quantisation step."""
    model = get_peft_model(quantised(), config())
    layer = next(iter(abba_layers(model).values()))
    before = dequantised(layer)
    train(model, ids, steps=5)
    logits(model, ids)
    target = before + layer.get_delta_weight("default")
    model.merge_adapter(safe_merge=True)
    step = before.abs().max() / 4
    torch.testing.assert_close(dequantised(layer), target, atol=step.item(), rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(dequantised(layer), before, atol=step.item(), rtol=0)
    kinds = {type(module) for module in quantised().modules()}
    assert {type(module) for module in model.merge_and_unload().modules()} == kinds
