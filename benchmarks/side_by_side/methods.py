"""How each method is put on a base model, at the same number of trained parameters.

Shapes: a projection is (m, n). ABBA with r1 = r2 = r has 2r(m + n) parameters in it, as LoRA, DoRA and HiRA of rank 2r and LoHa
of rank r have. DoRA has m magnitudes more, and full fine-tuning trains everything.
"""

import copy
import importlib
import importlib.util
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from abba_cli.adapter import AbbaConfig
from abba_cli.errors import ModelError

from .grids import EFFECTIVE, FACTORED, OURS, REFERENCE, SMALL_VOCABULARY, Row, Shape

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "nf4": torch.bfloat16, "fp32": torch.float32}
# PEFT keeps their factors in float32, and on a GPU people run them under autocast. On a CPU that would cost them 40% of a step.
UNDER_AUTOCAST = {"LoRA", "DoRA", "HiRA", "LoHa"}


class NotHere(Exception):
    """A method that the installed packages do not have; the others are measured without it."""


def base_model(row: Row, shape: Shape, layers: int, device: torch.device) -> LlamaForCausalLM:
    """Returns a frozen Llama of this shape with random weights, quantised if the row says so."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary if row.whole else min(shape.vocabulary, SMALL_VOCABULARY),
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(row.length, 2048),
        use_cache=False,
    )
    default = torch.get_default_dtype()
    # Not the `dtype` argument, which has another name in older versions of transformers.
    torch.set_default_dtype(DTYPES[row.precision])
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if row.precision == "nf4":
        _quantise(model, device)
    model.requires_grad_(False).train()
    return model


def adapted(name: str, base: LlamaForCausalLM, row: Row, shape: Shape, reference: Path | None) -> nn.Module:
    """Returns the method's model. It shares the weights of `base`, which are not changed.

    Raises:
        NotHere: the installed packages do not have the method.
        ModelError: the folder of the authors' code does not hold it.
    """
    model: Any = _sharing_weights(base)
    if row.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # A single layer stands for one in the middle of a model, which hands a gradient down. A whole model needs none at its input.
    if name == "floor" or not row.whole:
        model.enable_input_require_grads()
    model = _adapt(name, model, row.rank, reference).train()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = len(base.model.layers)
    expected = layers * sum(2 * row.rank * (m + n) + (m if name == "DoRA" else 0) for m, n in shape.linears)
    if name not in ("floor", "full"):
        assert trained == expected, f"{name} trains {trained:,} parameters, not {expected:,}"
    return model  # type: ignore[no-any-return]


def _adapt(name: str, model: nn.Module, rank: int, reference: Path | None) -> nn.Module:
    if name == "floor":
        return model
    if name == "full":
        return model.requires_grad_(True)
    if name == REFERENCE:
        assert reference is not None
        return _authors_model(model, rank, reference)
    config = _peft_config(name, rank)
    # PEFT's own default, float32 factors, everywhere but where the name says otherwise.
    return get_peft_model(model, config, autocast_adapter_dtype=name != "LoRA, base dtype")


def _peft_config(name: str, rank: int) -> peft.PeftConfig:
    common: dict[str, Any] = {"target_modules": TARGETS}
    if name in ("LoRA", "LoRA, base dtype", "DoRA"):
        return LoraConfig(r=2 * rank, lora_alpha=2 * rank, use_dora=name == "DoRA", **common)
    if name == "LoHa":
        return LoHaConfig(r=rank, alpha=rank, **common)
    if name == "HiRA":
        if not hasattr(peft, "HiraConfig"):
            raise NotHere(f"PEFT {peft.__version__} has no HiRA")
        return peft.HiraConfig(r=2 * rank, **common)
    way = {OURS: "auto", FACTORED: "factored", EFFECTIVE: "effective"}[name]
    if "kernel" in {field.name for field in fields(AbbaConfig)}:
        common["kernel"] = way
    elif way != "auto":
        raise NotHere("this version of abba has one way of computing")
    return AbbaConfig(r1=rank, r2=rank, init_weights="random", **common)  # the start by SVD is not part of a step


def _authors_model(model: nn.Module, rank: int, folder: Path) -> nn.Module:
    """The authors' layers on a model, from a checkout of theirs that is used as it is.

    Their file defines `ABBAConfig` twice, and what is left of the name is the layer; `apply_abba` takes any object with the
    attributes of the lost dataclass.
    """
    file = folder / "abba.py"
    if not file.is_file():
        raise ModelError(f"--reference {folder}: there is no abba.py in it; expected a checkout of github.com/CERT-Lab/abba.")
    spec = importlib.util.spec_from_file_location("authors_abba", file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "apply_abba") or not hasattr(module.ABBAConfig, "init_weights_svd_mixed"):
        raise ModelError(f"{file} does not hold the authors' layer; expected commit 370d40c of github.com/CERT-Lab/abba.")
    # Its SVD of every weight takes longer than the measurement and leaves no trace in the time of a step.
    module.ABBAConfig.init_weights_svd_mixed = _random_factors
    config = types.SimpleNamespace(r1=rank, r2=rank, alpha1=16.0, alpha2=16.0, dropout=0.0, target_modules=TARGETS)
    return module.apply_abba(model, config)  # type: ignore[no-any-return]


def _random_factors(layer: Any, adapter_name: str) -> None:
    weight = layer.base_layer.weight
    for factors in (layer.lora_A1, layer.lora_B1, layer.lora_A2, layer.lora_B2):
        shape = factors[adapter_name].shape
        factors[adapter_name].data = torch.randn(shape, device=weight.device).mul_(0.01).to(weight.dtype)


def _sharing_weights(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy whose parameters are objects of their own over the same memory, so that one method cannot unfreeze another's."""
    own = {id(old): new for old, new in _twins(base)}
    return copy.deepcopy(base, memo=own)


def _twins(base: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    for parameter in base.parameters():
        # A quantised parameter carries its scales along, and nothing trains it.
        quantised = not parameter.is_floating_point()
        yield parameter, parameter if quantised else nn.Parameter(parameter.detach(), requires_grad=False)


def _quantise(model: LlamaForCausalLM, device: torch.device) -> None:
    """Replaces the projections by nf4 layers with double quantisation, as `load_in_4bit` makes them."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")

    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if leaf in TARGETS:
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, device="meta"
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            )
            setattr(model.get_submodule(parent), leaf, layer.to(device))
    # PEFT asks for this mark, which `from_pretrained` would have set.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
