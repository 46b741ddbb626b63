"""A merge before it runs: adapters, base and checkpoint found to fit each other, and every tensor given its place."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from abba_cli.bases import Base
from abba_cli.checkpoint import Checkpoint, arrange, download, read_checkpoint
from abba_cli.errors import ModelError
from abba_cli.loading import load_config, skeleton
from abba_cli.merge.tensors import OutTensor, Quantised, plan_tensors, tied_parameters
from abba_cli.recipe import ModelSection
from abba_cli.recorded_base import LayerKind, fit, recorded_base, resolve_base
from abba_cli.saved_adapter import SavedAdapter, open_adapter

BasePrecision = Literal["original", "dequantized"]


@dataclass(frozen=True)
class MergePlan:
    """Everything known about a merge before a weight is read."""

    adapters: Sequence[tuple[SavedAdapter, float]]
    base: Base
    config: PreTrainedConfig
    checkpoint: Checkpoint
    shards: Mapping[str, Sequence[OutTensor]]
    dtype: torch.dtype | None
    quantised: Quantised | None
    untied: bool

    @property
    def size(self) -> int:
        """Bytes of the tensors that will be written."""
        return sum(tensor.planned.size for shard in self.shards.values() for tensor in shard)

    @property
    def parameters(self) -> int:
        """Numbers in the tensors that will be written."""
        return sum(math.prod(tensor.source.shape) for shard in self.shards.values() for tensor in shard)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Types of the tensors that will be written, by the parameters' names."""
        return {tensor.parameter: tensor.dtype for shard in self.shards.values() for tensor in shard if tensor.dtype}

    @property
    def layers(self) -> int:
        """Layers that at least one adapter changes."""
        return len({layer for adapter, _ in self.adapters for layer in adapter.layers})


def plan_merge(
    folders: Sequence[Path],
    weights: Sequence[float] | None = None,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    base_precision: BasePrecision = "original",
    shard_bytes: int | None = None,
    force: bool = False,
) -> MergePlan:
    """Check everything that can be checked before a weight is read; the arguments are those of `merge`.

    Raises:
        ModelError: Something does not fit.
    """
    if any(not math.isfinite(weight) for weight in weights or ()):
        raise ModelError(f"--weight is {', '.join(f'{weight:g}' for weight in weights or ())}; expected numbers")
    if weights and len(weights) != len(folders):
        raise ModelError(
            f"{len(folders)} adapters and {len(weights)} weights were given; expected one --weight for each --adapter"
        )
    adapters = [(open_adapter(path), weight) for path, weight in zip(folders, weights or [1.0] * len(folders), strict=True)]
    found = resolve_base([adapter for adapter, _ in adapters], base, revision, force)
    folder = download(found)
    config = load_config(Base(str(folder)), ModelSection(name=found.location))
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{found.location} is stored quantised, so a merge would round every weight again; name the original with --base "
            "and --force"
        )
    kinds: dict[str, LayerKind] = {}
    for adapter, _ in adapters:
        kinds.update(fit(adapter, config))
    model = skeleton(config, ModelSection(name=found.location))
    checkpoint = read_checkpoint(folder)
    target = None if dtype is None else getattr(torch, dtype)
    quantised = _quantised([adapter for adapter, _ in adapters]) if base_precision == "dequantized" else None
    tensors = plan_tensors(checkpoint, model, adapters, kinds, target, quantised)
    return MergePlan(
        adapters, found, config, checkpoint, _files(checkpoint, tensors, shard_bytes), target, quantised, _unties(model, tensors)
    )


def _quantised(adapters: Sequence[SavedAdapter]) -> Quantised:
    record = recorded_base(adapters[0])
    if record.quantization == "none":
        raise ModelError(
            f"{adapters[0].path} was not trained on a quantised base, as far as its files tell; leave --base-precision out"
        )
    return Quantised(record.quantization, getattr(torch, record.dtype))


def _files(checkpoint: Checkpoint, tensors: Sequence[OutTensor], limit: int | None) -> dict[str, list[OutTensor]]:
    """Assign tensors to files: the base's own, or new ones of at most `limit` bytes."""
    if limit is None:
        files: dict[str, list[OutTensor]] = {name: [] for name in checkpoint.metadata}
        for tensor in tensors:
            files[tensor.source.file.name].append(tensor)
    else:
        by_name = {tensor.name: tensor for tensor in tensors}
        shards = arrange([tensor.planned for tensor in tensors], limit)
        names = [SAFE_WEIGHTS_NAME]
        if len(shards) > 1:
            names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        files = {name: [by_name[one.name] for one in shard] for name, shard in zip(names, shards, strict=True)}
    # Wider types first, so that every tensor is aligned to its own type.
    return {name: sorted(shard, key=lambda one: -(one.dtype.itemsize if one.dtype else 8)) for name, shard in files.items()}


def _unties(model: PreTrainedModel, tensors: Sequence[OutTensor]) -> bool:
    """Whether two parameters that shared a tensor no longer do."""
    changed = {tensor.parameter for tensor in tensors if tensor.changed}
    return any(changed & {first, second} for first, second in tied_parameters(model).items())
