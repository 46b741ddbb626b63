"""What a full fine-tuning changed: dW = W_tuned - W_base of each linear layer."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from abba_cli.checkpoint import Checkpoint, Stored
from abba_cli.errors import ModelError
from abba_cli.reconstruction.matrices import Target, read_matrix, read_weights

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
    chosen = _choose(layers, patterns, after)
    for layer, (new, old) in chosen.items():
        if new.shape != old.shape:
            raise ModelError(
                f"{layer} is {list(old.shape)} in {before.folder} and {list(new.shape)} in {after.folder}; is the one "
                "the base of the other?"
            )
    changed = {layer: pair for layer, pair in chosen.items() if _difference(*pair).any()}
    if not changed:
        raise ModelError(f"{len(chosen)} layers of {before.folder} and {after.folder} are all equal; expected a tuned model")
    return [
        Target(layer, layer.rpartition(".")[2], lambda pair=pair: _difference(*pair))  # type: ignore[misc]
        for layer, pair in changed.items()
    ]


def _layers(checkpoint: Checkpoint) -> dict[str, Stored]:
    return {
        name.removesuffix(_WEIGHT): stored
        for name, stored in checkpoint.tensors.items()
        if name.endswith(_WEIGHT) and len(stored.shape) == 2
    }


def _choose(
    layers: Mapping[str, tuple[Stored, Stored]], patterns: Sequence[str], after: Checkpoint
) -> dict[str, tuple[Stored, Stored]]:
    # Embeddings and the head are matrices as well, but stand outside of the blocks.
    inside = [layer for layer in layers if re.search(r"\.\d+\.", layer)]
    types = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in inside)) or "none"
    matched: set[str] = set(inside if not patterns else ())
    for pattern in patterns:
        found = {layer for layer in layers if layer.rpartition(".")[2] == pattern or fnmatchcase(layer, pattern)}
        if not found:
            raise ModelError(f"{pattern!r} matches no layer that both models store; their types of layers are: {types}")
        matched |= found
    if not matched:
        raise ModelError(f"{after.folder} shares no linear layer with its base; expected two checkpoints of one architecture")
    return {layer: pair for layer, pair in layers.items() if layer in matched}


def _difference(new: Stored, old: Stored) -> torch.Tensor:
    return read_matrix(new) - read_matrix(old)
