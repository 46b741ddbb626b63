"""Checkpoints whose tensors have other names than the model's parameters."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from models import write_adapter, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from abba_cli.errors import ModelError
from abba_cli.merge.tensors import parameter_names
from abba_cli.merging import merge


def test_names_that_transformers_changes_while_loading() -> None:
    """Gemma 3's published checkpoints say language_model.model where the model says model.language_model."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    parameters = list(model.state_dict())
    published = {name.replace("model.language_model.", "language_model.model."): name for name in parameters}
    assert any(old != new for old, new in published.items())
    assert parameter_names(published, model) == published


def test_a_layer_that_is_stored_together_with_others_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tiny_llama)
    adapter = write_adapter(tmp_path / "adapter", base)
    tensors = load_file(base / "model.safetensors")
    prefix = "model.layers.0.self_attn"
    parts = [tensors.pop(f"{prefix}.{name}_proj.weight") for name in "qkv"]
    save_file({**tensors, f"{prefix}.qkv_proj.weight": torch.cat(parts)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"does not store model.layers.0.self_attn.k_proj.weight as a tensor of its own \(3 such\)"
    ):
        merge([adapter])
