"""From a recipe's base to a tokenizer, a configuration, a skeleton, and the frozen model, quantised if asked."""

import importlib.util
import re
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
from transformers.quantizers.auto import AutoHfQuantizer

from abba_cli.bases import Base
from abba_cli.errors import ModelError
from abba_cli.hub import explain, no_progress_bars
from abba_cli.recipe import ModelSection

# By the ends of a configuration's keys. Far above any model: Switch-C has 2,048 experts, XLM-V 0.9 million tokens. Modules are
# built one by one, and some of their buffers are real, so that without a bound a damaged file would hang the program.
_BOUNDS = {
    re.compile(r"(^|_)(layers?|blocks?|experts?|heads?)$"): 4096,
    re.compile(r"(^|_)(size|dim|model|embd|ff|inner)$"): 4_000_000,
}


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
        ModelError: It cannot be had, or is of a size that no model has.
    """
    with explain(f"model {base.location}", page=base.location):
        if base.gguf_file is None:
            # Before transformers makes a list with an entry for each layer.
            _check_sizes(PreTrainedConfig.get_config_dict(base.location, **base.keywords())[0], base.location)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords()
        )
    return config


def _check_sizes(tree: dict[str, Any], location: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _check_sizes(value, location)
        most = next((bound for ends, bound in _BOUNDS.items() if ends.search(str(key))), None)
        if most is not None and isinstance(value, int) and value > most:
            raise ModelError(
                f"{location}: its config.json has {key}: {value:,}, and no model has more than {most:,}; "
                "the file is damaged: bring a good copy of it"
            )


def skeleton(config: PreTrainedConfig, model: ModelSection, **keywords: Any) -> PreTrainedModel:
    """The model's modules and shapes on the meta device, without memory or weights; other keywords go to transformers."""
    with explain(f"model {config.name_or_path}"), init_empty_weights():
        built: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code, **keywords
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


def load_model(base: Base, model: ModelSection, device: torch.device | None = None) -> PreTrainedModel:
    """The frozen base model, in the recipe's dtype and quantisation.

    Args:
        base: Where it is.
        model: The recipe's section.
        device: Where it goes; None is this process's device.

    Raises:
        ModelError: It cannot be had, has only pickled weights, or bitsandbytes is missing.
    """
    check_quantization(model)
    keywords: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "use_safetensors": True, **_attention(model)}
    if model.quantization != "none":
        keywords["quantization_config"] = _quantization(model)
    device = PartialState().device if device is None else device
    if device.type != "cpu" or (model.quantization != "none" and torch.cuda.is_available()):
        # Without a map, transformers takes a quantised model to the first GPU.
        keywords["device_map"] = {"": device}
    with explain(f"model {base.location}", page=base.location), no_progress_bars():
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords(), **keywords
        )
    return _frozen(loaded)


def empty_model(config: PreTrainedConfig, model: ModelSection) -> PreTrainedModel:
    """The modules that `load_model` makes, without memory or weights, for a process that gets them from another one."""
    built = skeleton(config, model, **_attention(model))
    if model.quantization != "none":
        quantizer = AutoHfQuantizer.from_config(_quantization(model), pre_quantized=False)
        quantizer.preprocess_model(model=built, device_map=None)
        quantizer.postprocess_model(model=built)
        built.hf_quantizer = quantizer
    return _frozen(built)


def _attention(model: ModelSection) -> dict[str, Any]:
    return {} if model.attention == "auto" else {"attn_implementation": model.attention}


def _quantization(model: ModelSection) -> BitsAndBytesConfig:
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
    )


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            # bitsandbytes 0.50.2 repacks a 4-bit weight in the first evaluation on such a CPU, and a later training forward
            # through the repacked layer loses the gradient of its input.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (no attribute of nn.Module)
    model.requires_grad_(False)
    model.config.use_cache = False  # training needs none; generation asks for its own
    return model
