"""What a fine-tuning changed: dW of each linear layer, as W_tuned - W_base or as a saved adapter has it."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from abba_cli.adapter import Factors, delta_weight
from abba_cli.checkpoint import Checkpoint, Stored
from abba_cli.errors import ModelError
from abba_cli.reconstruction.matrices import Target, read_matrix, read_weights
from abba_cli.saved_adapter import SavedAdapter, find_adapter, open_adapter

_WEIGHT = ".weight"


def find_differences(base: str, tuned: str, patterns: Sequence[str]) -> list[Target]:
    """The layers whose weights two checkpoints both store, grouped by type such as q_proj.

    Args:
        base: Hub id, directory or `package:IMPORT_NAME` of the model before.
        tuned: Of the model after.
        patterns: Types (q_proj) or names with shell wildcards (model.layers.0.*); none is every linear layer of a numbered block.

    Raises:
        ModelError: A model cannot be had, a pattern matches nothing, the shapes differ, or nothing was changed.
    """
    before, after = read_weights(base), read_weights(tuned)
    olds = _layers(before)
    layers = {layer: (new, olds[layer]) for layer, new in _layers(after).items() if layer in olds}
    chosen = {layer: layers[layer] for layer in _choose(layers, patterns, "that both models store")}
    if not chosen:
        raise ModelError(f"{after.folder} shares no linear layer with its base; expected two checkpoints of one architecture")
    for layer, (new, old) in chosen.items():
        if new.shape != old.shape:
            raise ModelError(
                f"{layer} is {list(old.shape)} in {before.folder} and {list(new.shape)} in {after.folder}; is the one "
                "the base of the other?"
            )
    changed = {layer: pair for layer, pair in chosen.items() if _difference(*pair).any()}
    if not changed:
        raise ModelError(f"{len(chosen)} layers of {before.folder} and {after.folder} are all equal; expected a tuned model")
    return [_target(layer, lambda pair=pair: _difference(*pair)) for layer, pair in changed.items()]  # type: ignore[misc]


def find_updates(source: str, patterns: Sequence[str]) -> list[Target]:
    """The updates that a saved adapter adds to its base, grouped by type of layer; of `method: full` those of a full fine-tuning.

    Args:
        source: A run, an adapter directory or a hub id.
        patterns: As for `find_differences`; none is every adapted layer.

    Raises:
        ModelError: There is no such adapter, its update depends on the base's weights, or a pattern matches nothing.
    """
    adapter = open_adapter(find_adapter(source))
    if adapter.update != "added":
        raise ModelError(
            f"{adapter.path} is {'a HiRA' if adapter.update == 'multiplied' else 'a DoRA'} adapter, whose update depends on the "
            "base's weights; merge it, and give the result as --tuned with its --base"
        )
    chosen = _choose(adapter.layers, patterns, f"that {adapter.path} adapts") if patterns else adapter.layers
    return [_target(layer, lambda layer=layer: _update(adapter, layer)) for layer in chosen]  # type: ignore[misc]


def _update(adapter: SavedAdapter, layer: str) -> torch.Tensor:
    return delta_weight(Factors(*(one.float() for one in adapter.factors(layer))), adapter.layers[layer].s)


def _target(layer: str, load: Callable[[], torch.Tensor]) -> Target:
    return Target(layer, layer.rpartition(".")[2], load)


def _layers(checkpoint: Checkpoint) -> dict[str, Stored]:
    return {
        name.removesuffix(_WEIGHT): stored
        for name, stored in checkpoint.tensors.items()
        if name.endswith(_WEIGHT) and len(stored.shape) == 2
    }


def _choose(layers: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    # Embeddings and the head are matrices as well, but stand outside of the blocks.
    inside = [layer for layer in layers if re.search(r"\.\d+\.", layer)]
    types = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in inside)) or "none"
    matched: set[str] = set(inside if not patterns else ())
    for pattern in patterns:
        found = {layer for layer in layers if layer.rpartition(".")[2] == pattern or fnmatchcase(layer, pattern)}
        if not found:
            raise ModelError(f"{pattern!r} matches no layer {where}; their types of layers are: {types}")
        matched |= found
    return [layer for layer in layers if layer in matched]


def _difference(new: Stored, old: Stored) -> torch.Tensor:
    return read_matrix(new) - read_matrix(old)
