"""The recipe's adapter on a model: translated into PEFT's terms, and tried on the model's skeleton before any weight is read.

Shapes: an adapted layer's frozen weight W0 is (m, n); its factors are B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abba_cli import pissa
from abba_cli.adapter import svd_progress
from abba_cli.adapter.layer import weight_shape
from abba_cli.bases import Base
from abba_cli.errors import ModelError
from abba_cli.hub import explain
from abba_cli.loading import skeleton
from abba_cli.methods import DECISIVE, adapter_config, factor_layers, is_factor, ranks_of, without_start
from abba_cli.recipe import ModelSection
from abba_cli.recipe_adapter import AdapterSection


def attach_adapter(
    model: PreTrainedModel,
    adapter: AdapterSection,
    base: Base,
    start_from: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    kinds: str = "",
) -> PeftModel:
    """Put the recipe's adapter on a model.

    Args:
        model: The base, or its skeleton.
        adapter: The recipe's section.
        base: Recorded in the adapter's configuration.
        start_from: A checkpoint or trained adapter to load instead of a fresh start; no SVD runs then.
        progress: Called with layers done and layers in all during the SVD of a fresh start.
        kinds: The names of linear layers, for the message when no target matches.

    Raises:
        ModelError: The targets match no layer, or `start_from` does not fit.
    """
    config = adapter_config(adapter, base)
    if isinstance(config, LoraConfig) and adapter.method == "pissa" and model.device.type != "meta":
        return _pissa(model, config, adapter, start_from, progress or _ignore_progress, kinds)
    if start_from is not None:
        return _load_adapter(model, config, adapter, start_from)
    if model.device.type == "meta":
        without_start(config)
        with init_empty_weights():
            adapted = _inject(model, config, adapter, kinds)
    else:
        with svd_progress(progress or _ignore_progress):
            adapted = _inject(model, config, adapter, kinds)
    return adapted


def _pissa(
    model: PreTrainedModel,
    config: LoraConfig,
    adapter: AdapterSection,
    checkpoint: str | None,
    progress: Callable[[int, int], None],
    kinds: str,
) -> PeftModel:
    init = str(config.init_lora_weights)
    without_start(config)
    if checkpoint is not None:
        check_saved(pissa.saved_form(config), checkpoint)
    adapted = _inject(model, config, adapter, kinds)
    if checkpoint is None:
        pissa.start(adapted, init, progress)
    else:
        pissa.go_on(adapted, checkpoint, init)
    return adapted


def _ignore_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer under the adapter: W0 is (m, n); `ranks` are those of its pairs."""

    name: str
    m: int
    n: int
    ranks: tuple[int, ...]
    parameters: int


def adapted_layers(adapted: PeftModel) -> list[AdaptedLayer]:
    """The layers that carry the adapter, in the model's order."""
    return [
        AdaptedLayer(
            name,
            *weight_shape(layer.get_base_layer()),
            ranks_of(layer)["default"],
            sum(one.numel() for key, one in layer.named_parameters() if is_factor(f".{key}", adapted)),
        )
        for name, layer in factor_layers(adapted.get_base_model())
    ]


def check_adapter(config: PreTrainedConfig, model: ModelSection, adapter: AdapterSection, base: Base) -> PeftModel:
    """Try the recipe's adapter on the model's skeleton, before any weight is read.

    Returns:
        The adapted skeleton.

    Raises:
        ModelError: A target matches no layer (the message lists those that exist), or a rank exceeds a layer's smaller side.
    """
    bare = skeleton(config, model)
    head = bare.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [name for name, module in bare.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    adapted = attach_adapter(bare, adapter, base, kinds=kinds)
    layers = adapted_layers(adapted)
    for target in adapter.targets if isinstance(adapter.targets, list) else []:
        # PEFT is content when one of several names matches; a misspelt one would silently stay untrained.
        if not any(layer.name == target or layer.name.endswith(f".{target}") for layer in layers):
            raise ModelError(f"adapter.targets: {target!r} matches no layer; the model's linear layers are: {kinds}")
    _check_names(adapted, adapter, layers)
    head_name = next((name for name, module in adapted.get_base_model().named_modules() if module is adapted_head(adapted)), None)
    if config.get_text_config().tie_word_embeddings and any(layer.name == head_name for layer in layers):
        raise ModelError(
            f"adapter.targets matches {head_name}, which shares its weight with the embeddings in this model: the adapter "
            "could not be merged; leave it out with adapter.exclude"
        )
    for layer in layers:
        for key, rank in zip(("r1", "r2") if adapter.method == "abba" else ("rank",), layer.ranks, strict=False):
            if rank > min(layer.m, layer.n):
                raise ModelError(
                    f"adapter.{key} is {rank}, but {layer.name} is {layer.m} x {layer.n}: expected at most "
                    f"{min(layer.m, layer.n)}; lower adapter.{key}, or give this layer its own rank in adapter.rank_pattern"
                )
    return adapted


def adapted_head(adapted: PeftModel) -> nn.Module | None:
    """The model's output layer, adapted or not."""
    base = adapted.get_base_model()
    assert isinstance(base, PreTrainedModel)
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _check_names(adapted: PeftModel, adapter: AdapterSection, layers: list[AdaptedLayer]) -> None:
    """Raise a ModelError for a pattern or module name that matches nothing; PEFT would ignore it."""
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            if not any(get_pattern_key([pattern], layer.name) == pattern for layer in layers):
                raise ModelError(f"adapter.{key}: {pattern!r} matches none of the {len(layers)} adapted layers")
    names = [name for name, _ in adapted.get_base_model().named_modules()]
    for module in adapter.modules_to_save:
        if not any(name == module or name.endswith(f".{module}") for name in names):
            raise ModelError(f"adapter.modules_to_save: the model has no module {module!r}")


def check_plan(adapted: PeftModel, layers: list[AdaptedLayer], trainable: int) -> None:
    """Compare an adapter on its model with what the recipe planned; a loaded adapter may have other targets.

    Raises:
        ModelError: Layers, ranks or the number of trained parameters differ.
    """
    found = adapted_layers(adapted)
    count = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    if found != layers or count != trainable:
        raise ModelError(
            f"the loaded adapter has {len(found)} layers and {count:,} trained parameters, the recipe "
            f"{len(layers)} and {trainable:,}; give the recipe's adapter section the saved adapter's values"
        )


def _inject(model: PreTrainedModel, config: PeftConfig, adapter: AdapterSection, kinds: str) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # PEFT's notices of what check_adapter reports as errors.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT sets it as each layer needs it
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            adapted = get_peft_model(model, config, autocast_adapter_dtype=adapter.dtype == "float32")
    except ValueError as error:
        if "not found in the base model" in str(error) or "No modules were targeted" in str(error):
            found = f"{adapter.targets!r} matches no layer; the model's linear layers are: {kinds}"
            if isinstance(adapter.targets, str):
                found += f" (a string is one regular expression over full names; write names as a list: [{adapter.targets}])"
            raise ModelError(f"adapter.targets: {found}") from None
        if "is not supported" in str(error):
            raise _no_linear_layer(adapter, str(error).removeprefix("Target module ").partition("(")[0], kinds) from None
        raise ModelError(f"adapter: {' '.join(str(error).split())}") from None
    assert isinstance(adapted, PeftModel)
    for _, layer in factor_layers(adapted.get_base_model()):
        if isinstance(layer.get_base_layer(), nn.Embedding):  # which some of PEFT's methods would adapt
            raise _no_linear_layer(adapter, "Embedding", kinds)
    for name, parameter in adapted.named_parameters():
        if is_factor(name, adapted):
            parameter.data = parameter.data.to(getattr(torch, adapter.dtype))
    return adapted


def _no_linear_layer(adapter: AdapterSection, kind: str, kinds: str) -> ModelError:
    found = f"{adapter.targets!r} matches {'an' if kind[0] in 'AEIOU' else 'a'} {kind}, which is no linear layer"
    return ModelError(f"adapter.targets: {found}; the model's linear layers are: {kinds}")


def _load_adapter(model: PreTrainedModel, config: PeftConfig, adapter: AdapterSection, start_from: str) -> PeftModel:
    check_saved(config, start_from)
    with explain(f"adapter {start_from}", page=start_from):
        adapted = PeftModel.from_pretrained(
            model, start_from, is_trainable=True, autocast_adapter_dtype=adapter.dtype == "float32"
        )
    assert isinstance(adapted, PeftModel)
    return adapted


def check_saved(config: PeftConfig, start_from: str) -> None:
    """Compare a saved adapter's configuration with the recipe's, without reading its weights.

    Raises:
        ModelError: There is none, it is of another method, or its ranks or alphas are others.
    """
    local = start_from.startswith(".") or Path(start_from).is_absolute() or start_from.count("/") != 1
    if local and not Path(start_from).is_dir():
        raise ModelError(f"adapter.start_from: there is no directory {start_from}; expected a run, an adapter or a hub id")
    with explain(f"adapter {start_from}", page=start_from):
        saved = PeftConfig.from_pretrained(start_from)
    if saved.peft_type != config.peft_type:
        raise ModelError(f"{start_from} holds a {saved.peft_type} adapter; the recipe trains a {config.peft_type} one")
    for key in DECISIVE:
        if getattr(saved, key, None) != getattr(config, key, None):
            raise ModelError(
                f"{start_from} was trained with {key} = {getattr(saved, key)}, the recipe has {getattr(config, key)}; "
                "give the recipe the adapter's value"
            )
