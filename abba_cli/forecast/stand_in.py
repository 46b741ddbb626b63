"""A model to rehearse a training step with: the skeleton on fake tensors, with one block of each kind it has."""

import copy
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedConfig, PreTrainedModel

from abba_cli.forecast.quantised import quantise
from abba_cli.methods import factor_layers, is_factor
from abba_cli.recipe import Recipe


@dataclass(frozen=True)
class StandIn:
    """A model like the skeleton, but shorter.

    Attributes:
        model: The model, on fake tensors.
        blocks: Its blocks, in order; empty where the skeleton's could not be told apart from the rest.
        sequence: For every block of the skeleton the number of the block in `blocks` that is like it.
    """

    model: PeftModel
    blocks: list[nn.Module]
    sequence: list[int]


def stand_in(recipe: Recipe, skeleton: PeftModel, whole: bool = False) -> StandIn:
    """Make a stand-in; to be called, and used, under a FakeTensorMode.

    Args:
        recipe: The recipe. Its quantisation, attention and type of factors hold, whatever the skeleton was made with.
        skeleton: The adapted skeleton, unchanged afterwards.
        whole: Keep all blocks, to check that fewer say the same.
    """
    name, blocks = _blocks(skeleton)
    kinds = _kinds(skeleton, blocks)
    kept = list(range(len(blocks))) if whole else sorted({kinds.index(kind) for kind in kinds})
    model = _copy(skeleton, name, [blocks[number] for number in kept])
    _cut_config(base_of(model).config, len(blocks), kept)
    _imagine(model, getattr(torch, recipe.adapter.dtype))
    if recipe.model.quantization != "none":
        quantise(model, recipe.model.quantization)
    if recipe.model.attention != "auto":
        # The kernels of flash attention keep what PyTorch's own keep.
        attention = "eager" if recipe.model.attention == "eager" else "sdpa"
        base_of(model).set_attn_implementation(attention)
    base_of(model).config.use_cache = False
    model.train()
    if recipe.adapter.method == "loha":
        for _, layer in factor_layers(model):
            layer.eval()  # in training PEFT's draws a number and looks at it, for a dropout of modules that is off
    if recipe.training.gradient_checkpointing:
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    sequence = kept if whole else [kept.index(kinds.index(kind)) for kind in kinds]
    return StandIn(model, _children(base_of(model), name), sequence)


def base_of(adapted: PeftModel) -> PreTrainedModel:
    """The model under the adapter."""
    base = adapted.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def _blocks(skeleton: PeftModel) -> tuple[str, list[nn.Module]]:
    """Name and content of the list of the model's blocks."""
    base = base_of(skeleton)
    depth = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, list(module)
    return "", []


def _children(base: nn.Module, name: str) -> list[nn.Module]:
    return list(base.get_submodule(name).children()) if name else []


def _kinds(skeleton: PeftModel, blocks: list[nn.Module]) -> list[Hashable]:
    """For every block what has to be equal for two of them to take the same memory."""
    base = base_of(skeleton)
    settings = list(_per_block(base.config, len(blocks)).values())
    embeddings: nn.Module = base.get_input_embeddings()
    # The gradient ends at the first trained block, so that this one and those before it keep less.
    reached = any(parameter.requires_grad for parameter in embeddings.parameters())
    kinds: list[Hashable] = []
    for number, block in enumerate(blocks):
        shapes = tuple((name, one.shape, one.dtype, one.requires_grad) for name, one in block.named_parameters())
        kinds.append((number == 0, type(block), shapes, tuple(values[number] for values in settings), reached))
        reached = reached or any(one.requires_grad for one in block.parameters())
    return kinds


def _per_block(config: PreTrainedConfig, depth: int) -> dict[str, list[Hashable]]:
    """Settings that a configuration lists for each block, such as the kinds of attention."""
    found = vars(config.get_text_config())
    return {key: value for key, value in found.items() if isinstance(value, list) and len(value) == depth > 1}


def _cut_config(config: PreTrainedConfig, depth: int, kept: list[int]) -> None:
    text = config.get_text_config()
    for key, value in _per_block(config, depth).items():
        setattr(text, key, [value[number] for number in kept])
    if depth:
        text.num_hidden_layers = len(kept)


def _copy(skeleton: PeftModel, name: str, blocks: list[nn.Module]) -> PeftModel:
    """Copy a skeleton with fewer blocks."""
    with unset_fake_temporarily():
        if not name:
            return copy.deepcopy(skeleton)
        parent, _, key = name.rpartition(".")
        owner = base_of(skeleton).get_submodule(parent)
        everything = getattr(owner, key)
        setattr(owner, key, nn.ModuleList(blocks))
        try:
            return copy.deepcopy(skeleton)
        finally:
            setattr(owner, key, everything)


def _imagine(model: PeftModel, factors: torch.dtype) -> None:
    """Give every parameter a fake tensor; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                dtype = factors if is_factor(f"{name}.{key}.", model) else old.dtype
                made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=old.requires_grad)
            module._parameters[key] = made[id(old)]
