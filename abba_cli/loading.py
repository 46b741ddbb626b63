"""From a recipe's base to a tokenizer, a configuration, a skeleton, and the frozen model, quantised if asked."""

import importlib.util
from typing import Any

import torch
from accelerate import PartialState, init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from abba_cli.bases import Base
from abba_cli.errors import ModelError
from abba_cli.hub import explain, no_progress_bars
from abba_cli.recipe import ModelSection


def load_tokenizer(base: Base, model: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token.

    Raises:
        ModelError: It cannot be had, or has no end-of-sequence token to learn to stop with.
    """
    with explain(f"model {base.location}", page=base.location):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords()
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {base.location} has no EOS token, so the model could never learn to stop")
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by this id, so sharing it with EOS does no harm.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(base: Base, model: ModelSection) -> PreTrainedConfig:
    """The base's configuration.

    Raises:
        ModelError: It cannot be had.
    """
    with explain(f"model {base.location}", page=base.location):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords()
        )
    return config


def skeleton(config: PreTrainedConfig, model: ModelSection) -> PreTrainedModel:
    """The model's modules and shapes on the meta device, without memory or weights."""
    with explain(f"model {config.name_or_path}"), init_empty_weights():
        built: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )
    built.tie_weights()
    return built


def check_quantization(model: ModelSection) -> None:
    """Make sure that the base can be quantised as the recipe asks.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantization: {model.quantization} needs bitsandbytes; pip install bitsandbytes")


def load_model(base: Base, model: ModelSection) -> PreTrainedModel:
    """The frozen base model, in the recipe's dtype and quantisation, on this process's device.

    Raises:
        ModelError: It cannot be had, has only pickled weights, or bitsandbytes is missing.
    """
    check_quantization(model)
    keywords: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "use_safetensors": True}
    if model.attention != "auto":
        keywords["attn_implementation"] = model.attention
    if model.quantization == "nf4":
        keywords["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        )
    elif model.quantization == "int8":
        keywords["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    device = PartialState().device
    if device.type != "cpu":
        keywords["device_map"] = {"": device}
    with explain(f"model {base.location}", page=base.location), no_progress_bars():
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords(), **keywords
        )
    for module in loaded.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            # bitsandbytes 0.50.2 repacks a 4-bit weight in the first evaluation on such a CPU, and a later training forward
            # through the repacked layer loses the gradient of its input.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (no attribute of nn.Module)
    loaded.requires_grad_(False)
    loaded.config.use_cache = False  # training needs none; generation asks for its own
    return loaded
