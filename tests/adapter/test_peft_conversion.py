"""PEFT's own conversion to LoRA (`convert_to_lora`, `save_as_lora`), by the SVD of every dW, on ABBA models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from peft import PeftModel, get_peft_model
from peft.tuners.lora import convert_to_lora, save_as_lora
from safetensors.torch import load_file
from test_adapter_model import abba_layers, config, logits, trained
from torch import nn

TARGETS = {"llama": ["q_proj", "down_proj"], "gemma2": ["o_proj", "gate_proj"], "gpt2": ["c_attn", "c_fc"]}


# PEFT's conversion leaves fan_in_fan_out to the loading, which says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize("architecture", TARGETS)
def test_the_full_rank_loses_nothing(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path, architecture: str) -> None:
    """r1 r2 = 15 is enough; PEFT stores GPT-2's factors the right way round."""
    model = trained(tiny(architecture), ids, target_modules=TARGETS[architecture])
    expected = logits(model, ids)
    save_as_lora(tmp_path, model, rank=15)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 15, 15)
    loaded = PeftModel.from_pretrained(tiny(architecture), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits(tiny(architecture), ids), atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}])
def test_a_smaller_rank_is_the_truncated_svd(tiny: ModelMaker, ids: torch.Tensor, settings: dict[str, Any]) -> None:
    model = trained(tiny(), ids, **settings)
    lora_config, tensors = convert_to_lora(model, rank=4)
    assert lora_config.r == lora_config.lora_alpha == 4
    layers = abba_layers(model)
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(product, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-6, rtol=1e-4)
        assert (product - delta).norm() > 1e-4 * delta.norm(), "a rank of 4 loses something"


def test_a_share_of_the_energy_chooses_ranks(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    model = trained(tiny(), ids)
    expected = logits(model, ids)
    save_as_lora(tmp_path, model, rank=1.0 - 1e-7)
    ranks = {key: len(value) for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in key}
    assert max(ranks.values()) <= 15
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-3, rtol=1e-3)


def test_modules_to_save_go_along(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    model = trained(tiny(), ids, target_modules=["q_proj"], modules_to_save=["norm"])
    save_as_lora(tmp_path, model, rank=15)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_of_a_file_gets_its_start_first(tiny: ModelMaker) -> None:
    """The SVD start that is put off to the first forward is not taken for an update: dW is still zero."""
    _, tensors = convert_to_lora(get_peft_model(tiny(), config()), rank=2)
    assert not any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)


def test_what_peft_refuses(tiny: ModelMaker, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="The adapter's config sets bias=all, this is not supported"):
        convert_to_lora(trained(tiny("qwen2"), ids, bias="all"), rank=4)
    with pytest.raises(ValueError, match="The chosen rank 13 is larger than the weight shape"):
        convert_to_lora(trained(tiny(), ids, target_modules=["k_proj"]), rank=13)  # which ours may have: r1 r2 is 15


def test_convolutions_are_refused() -> None:
    """PEFT would take the SVD of a kernel's slices."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 8, 3)

    model = get_peft_model(Net(), config(target_modules=["conv"]))
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*AbbaConv1d"):
        convert_to_lora(model, rank=2)
