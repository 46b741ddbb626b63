"""PiSSA (https://arxiv.org/abs/2404.02948): a LoRA on what is left of W0 without the product B0 A0 that it starts from.

Shapes: an adapted layer's weight W0 is (m, n), B0 and B are (m, r), A0 and A (r, n), s is the scale. Training sees
W0 - s B0 A0 + s B A. What is saved, at each checkpoint and at the end, is the same as a LoRA of rank 2r on the untouched W0, laid
out as PEFT's `LoraModel.subtract_mutated_init` does it:

    s (B A - B0 A0) = s [B | -B0] [A; A0]

Every reader of PEFT's form takes it, and it holds what a stopped run goes on from: the residual is made again from the saved B0
and A0, bit for bit, where a second decomposition might come out otherwise.
"""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from abba_cli.methods import factor_layers

_FILE = "adapter_model.safetensors"
_NAME = "default"


def saved_form(config: LoraConfig) -> LoraConfig:
    """The settings of the plain LoRA of rank 2r that is saved: twice the ranks and alphas, hence the same scales."""
    saved = copy.deepcopy(config)
    saved.init_lora_weights = True
    saved.r *= 2
    saved.lora_alpha *= 2
    saved.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    saved.alpha_pattern = {name: 2 * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return saved


def start(adapted: PeftModel, init: str, progress: Callable[[int, int], None]) -> None:
    """Give every adapted layer its first factors, the top of W0's singular value decomposition, and take them out of W0.

    Args:
        adapted: A LoRA of rank r on the base, whose weights are not quantised.
        init: PEFT's name of the start: `pissa`, or `pissa_niter_16` for the randomised decomposition.
        progress: Called with layers done and layers in all.
    """
    layers = factor_layers(adapted.get_base_model())
    progress(0, len(layers))
    for done, (_, layer) in enumerate(layers, start=1):
        weight = layer.get_base_layer().weight
        original, dtype = weight.data, layer.lora_B[_NAME].weight.dtype
        layer.pissa_init(_NAME, init)
        # PEFT's residual is that of float32 factors; ours is that of the factors as they are trained and saved.
        weight.data = original
        for factor in (layer.lora_B[_NAME], layer.lora_A[_NAME]):
            factor.weight.data = factor.weight.data.to(dtype).contiguous()
        _take_out(layer, layer.lora_B[_NAME].weight.data.clone(), layer.lora_A[_NAME].weight.data.clone())
        progress(done, len(layers))
    _settings(adapted).init_lora_weights = init  # whatever were saved without `convert` would be known by it, and refused


def go_on(adapted: PeftModel, folder: str, init: str) -> None:
    """Bring a LoRA of rank r on the base to where a checkpoint of `convert` left it."""
    tensors = load_peft_weights(folder, device="cpu")
    for name, layer in factor_layers(adapted.get_base_model()):
        rank, device = layer.r[_NAME], layer.get_base_layer().weight.device
        B, A = (tensors[f"{_key(name)}.{factor}.weight"] for factor in ("lora_B", "lora_A"))
        _take_out(layer, (-B[:, rank:]).contiguous().to(device), A[rank:].clone().to(device))
    set_peft_model_state_dict(adapted, trained_weights(adapted, folder))
    _settings(adapted).init_lora_weights = init


def is_pissa(adapted: PeftModel) -> bool:
    """Whether a model is trained by PiSSA, so that what its layers hold is not what is saved."""
    return any(True for _ in _starts(adapted))


def trained_weights(adapted: PeftModel, folder: str) -> dict[str, torch.Tensor]:
    """The weights of a saved adapter in the form that the model trains: with PiSSA the halves B and A of its factors."""
    tensors = load_peft_weights(folder, device="cpu")
    for name, (B0, A0) in _starts(adapted):
        for factor, dim, rank in (("lora_B", 1, B0.shape[1]), ("lora_A", 0, A0.shape[0])):
            key = f"{_key(name)}.{factor}.weight"
            tensors[key] = tensors[key].narrow(dim, 0, rank).contiguous()
    return tensors


def save(adapted: PeftModel, folder: Path) -> None:
    """Save an adapter of any method in PEFT's form."""
    adapted.save_pretrained(str(folder))
    convert(adapted, folder)


def convert(adapted: PeftModel, folder: Path) -> None:
    """Turn what PEFT has saved of a model into a LoRA of rank 2r on the untouched base; other methods' is left as it is."""
    if not is_pissa(adapted):
        return
    tensors = load_file(folder / _FILE)
    for name, (B0, A0) in _starts(adapted):
        for factor, one, dim in (("lora_B", -B0, 1), ("lora_A", A0, 0)):
            key = f"{_key(name)}.{factor}.weight"
            tensors[key] = torch.cat([tensors[key], one], dim).contiguous()
    partial = folder / f".{_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})  # the tensors read may still be those in the file
    os.replace(partial, folder / _FILE)
    settings = saved_form(_settings(adapted))
    settings.inference_mode = True
    settings.save_pretrained(str(folder))  # last: until then the settings say `pissa`, which is refused


def _take_out(layer: Any, B0: torch.Tensor, A0: torch.Tensor) -> None:
    """W0 - s B0 A0 in place of W0, equation 4 of the paper, rounded to W0's type."""
    weight = layer.get_base_layer().weight
    product = layer.scaling[_NAME] * (B0.float() @ A0.float())
    weight.data = (weight.data.float() - (product.T if layer.fan_in_fan_out else product)).to(weight.dtype)
    layer.pissa_start = (B0.cpu(), A0.cpu())


def _starts(adapted: PeftModel) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Name and (B0, A0) of every layer that has them."""
    for name, layer in factor_layers(adapted.get_base_model()):
        if hasattr(layer, "pissa_start"):
            yield name, layer.pissa_start


def _settings(adapted: PeftModel) -> Any:
    return adapted.peft_config[_NAME]


def _key(layer: str) -> str:
    return f"base_model.model.{layer}"
