"""`generate` through PEFT: every bit of the merged model's, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from peft import PeftModel, get_peft_model
from torch import nn

from abba_cli.adapter import AbbaConfig, AbbaLinear

CASES = [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32), ("gpt2", torch.bfloat16)]


def adapted(tiny: ModelMaker, architecture: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    given = {"r1": 3, "r2": 5, "alpha": 4.0, "target_modules": "all-linear", "init_weights": False, **settings}
    given["task_type"] = "CAUSAL_LM"  # PEFT's other classes go round the tuner's `generate`
    return get_peft_model(tiny(architecture, dtype), AbbaConfig(**given)).eval()


def layers(model: nn.Module) -> list[AbbaLinear]:
    found = [module for module in model.modules() if isinstance(module, AbbaLinear)]
    assert found
    return found


def scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of six generated tokens, the first of which comes from the prompt's forward."""
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=6,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(said.logits)


def merged(model: PeftModel) -> Any:
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_every_token_has_the_merged_models_bits(
    tiny: ModelMaker, ids: torch.Tensor, architecture: str, dtype: torch.dtype
) -> None:
    model = adapted(tiny, architecture, dtype)
    expected = scores(merged(model), ids)
    assert torch.equal(scores(model, ids), expected)
    assert torch.equal(scores(model, ids), expected)  # from what was kept
    with model.disable_adapter():
        assert not torch.equal(scores(model, ids), expected)
    assert torch.equal(scores(model, ids), expected)


def test_the_weight_is_made_once(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    scores(model, ids)
    kept = [layer._kept for layer in layers(model)]
    assert all(one is not None and one.weight is not None for one in kept)
    scores(model, ids)
    assert all(layer._kept is one for layer, one in zip(layers(model), kept, strict=True))


@pytest.mark.parametrize("through_data", [True, False])
def test_a_change_between_two_texts_is_seen(tiny: ModelMaker, ids: torch.Tensor, through_data: bool) -> None:
    model = adapted(tiny)
    before = scores(model, ids)
    with torch.no_grad():
        for layer in layers(model)[::3]:
            factor = layer.abba_B1["default"]
            (factor.data if through_data else factor).mul_(-3)
    found = scores(model, ids)
    assert not torch.equal(found, before)
    assert torch.equal(found, scores(merged(model), ids))


def test_other_calls_use_the_factors_again(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    scores(model, ids)
    assert all(layer._settled is None for layer in layers(model))
    model.train()
    assert all(layer._kept is None for layer in layers(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".abba_" in name)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(factor.grad is not None for layer in layers(model) for factor in layer.factors("default"))


def test_an_error_leaves_nothing_settled(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)

    def stop(*_: Any, **__: Any) -> Any:
        assert any(layer._settled is not None for layer in layers(model))
        raise KeyboardInterrupt

    handle = model.get_base_model().register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        scores(model, ids)
    handle.remove()
    assert all(layer._settled is None for layer in layers(model))


def test_training_mode_keeps_nothing(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny, dropout=0.5).train()
    scores(model, ids)
    assert all(layer._kept is None for layer in layers(model))


def test_two_adapters_and_a_change_of_their_scales(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    model.add_adapter("second", AbbaConfig(r1=2, r2=2, target_modules="all-linear", init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    assert torch.equal(scores(model, ids), scores(merged(model), ids))
    for layer in layers(model):
        layer.set_scale("second", 3.0)
    assert torch.equal(scores(model, ids), scores(merged(model), ids))
    model.set_adapter("second")
    model.eval()
    assert torch.equal(scores(model, ids), scores(merged(model), ids))
