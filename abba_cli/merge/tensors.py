"""What a merge does to each tensor of a checkpoint: copied, cast, or W0 + sum of w s (B1 A1) * (B2 A2), block by block.

Shapes: an adapted layer's weight W0 is (m, n), stored (m, n) or, by a Conv1D, transposed as (n, m).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import torch
from transformers import PreTrainedModel

from abba_cli.adapter import Factors
from abba_cli.adapter.dense import effective_weight
from abba_cli.checkpoint import DTYPES, Checkpoint, Planned, Stored, planned, read_file, write_tensor
from abba_cli.errors import ModelError
from abba_cli.merge.dequantising import quantised_layers, round_trip
from abba_cli.recorded_base import LayerKind
from abba_cli.rundir import ADAPTER_FILES
from abba_cli.saved_adapter import SavedAdapter, Update

# A block of rows is worked on in float32, with about four temporaries of its size.
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Quantised:
    """How training saw a layer of a quantised base: nf4 or int8, made from weights of `dtype`."""

    quantization: str
    dtype: torch.dtype


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the merged checkpoint.

    Args:
        name: In the checkpoint.
        parameter: In the model.
        source: What the base stores for it (a tied tensor's partner, where it had none of its own).
        dtype: Of the result; None for a tensor that is copied whatever it holds.
        updates: Adapters on this layer, with their weights.
        kind: How the layer stores its weight.
        whole: Adapters that trained the parameter whole, with their weights.
        quantised: The base's weight is taken as quantised and back.
    """

    name: str
    parameter: str
    source: Stored
    dtype: torch.dtype | None
    updates: Sequence[tuple[SavedAdapter, float]] = ()
    kind: LayerKind = "linear"
    whole: Sequence[tuple[Stored, float]] = field(default=())
    quantised: Quantised | None = None

    @property
    def changed(self) -> bool:
        """Whether an adapter changes it."""
        return bool(self.updates or self.whole)

    @property
    def planned(self) -> Planned:
        """Its place in a file."""
        if self.dtype is None:
            return Planned(self.name, self.source.dtype, self.source.shape, self.source.size)
        return planned(self.name, self.dtype, self.source.shape)

    @property
    def copied(self) -> bool:
        """Whether the base's bytes are taken as they are."""
        untouched = not self.changed and self.quantised is None
        return self.dtype is None or (untouched and DTYPES[self.source.dtype] == self.dtype)

    def write(self, stream: IO[bytes], device: torch.device) -> None:
        """Write its bytes.

        Raises:
            ModelError: A merged value is not finite in `dtype`.
        """
        if self.copied:
            self.source.copy_to(stream)
            return
        for block in self._blocks(device):
            if not block.isfinite().all():
                raise ModelError(
                    f"{self.name} is not finite in {str(self.dtype).removeprefix('torch.')} after the merge: the sum is too "
                    "large for the type; choose a wider --dtype, or look at --weight"
                )
            write_tensor(stream, block)

    def _blocks(self, device: torch.device) -> Iterator[torch.Tensor]:
        """The result in blocks of rows; the sum is made in float32 (float64 for a float64 base) and rounded once."""
        assert self.dtype is not None
        layer = self.parameter.removesuffix(".weight")
        updates = [_Update.read(adapter, layer, weight, device) for adapter, weight in self.updates]
        rows = self.source.shape[0] if self.source.shape else 1
        step = max(1, _BLOCK_BYTES // 4 // max(1, self.source.size // self.source.torch_dtype.itemsize // max(1, rows)))
        if self.quantised is not None or (self.kind == "transposed" and any(one.lengths is not None for one in updates)):
            step = rows  # the scales of the blocks of a weight are quantised together; lengths are those of whole rows of W0
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            base = self.source.rows(start, stop).to(device)
            if self.quantised is not None:
                base = round_trip(base, self.quantised.quantization, self.quantised.dtype, self.kind == "transposed")
            wide = base.to(torch.promote_types(base.dtype, torch.float32))
            if len(self.whole) == 1 and self.whole[0][1] == 1.0:
                wide = self.whole[0][0].rows(start, stop).to(wide)
            else:
                for trained, weight in self.whole:
                    wide = wide + weight * (trained.rows(start, stop).to(wide) - base.to(wide))
            if updates:
                wide = _updated(wide.reshape(stop - start, -1), updates, start, stop, self.kind).view_as(wide)
            yield wide.to(self.dtype)


class _Update(NamedTuple):
    """One adapter's change of a layer: D = s (B1 A1) * (B2 A2), and what happens to W0 with it."""

    how: Update
    factors: Factors
    s: float
    weight: float
    lengths: torch.Tensor | None

    @classmethod
    def read(cls, adapter: SavedAdapter, layer: str, weight: float, device: torch.device) -> "_Update":
        factors = Factors(*(one.to(device, torch.float32) for one in adapter.factors(layer)))
        lengths = adapter.magnitude(layer).to(device, torch.float32) if adapter.update == "normalised" else None
        return cls(adapter.update, factors, adapter.layers[layer].s, weight, lengths)


def _updated(block: torch.Tensor, updates: Sequence[_Update], start: int, stop: int, kind: LayerKind) -> torch.Tensor:
    """A block of rows of the stored weight with all updates in it."""
    transposed = kind == "transposed"
    cut = [(one, _cut(one.factors, start, stop, kind)) for one in updates]
    result = effective_weight(block, [(part, one.weight * one.s) for one, part in cut if one.how == "added"], transposed)
    for one, part in cut:
        if one.how == "multiplied":
            result = result + block * effective_weight(None, [(part, one.weight * one.s)], transposed)
        elif one.lengths is not None:
            # DoRA, equation 5 of https://arxiv.org/abs/2402.09353: W0 + D with rows of the trained lengths
            sums = effective_weight(block, [(part, one.s)], transposed)
            lengths = one.lengths if transposed else one.lengths[start:stop, None]
            scaled = sums * (lengths / sums.norm(dim=0 if transposed else 1, keepdim=True))
            result = result + one.weight * (scaled - block)
    return result


def _cut(factors: Factors, start: int, stop: int, kind: LayerKind) -> Factors:
    """The factors of a block of rows of the stored weight, which are columns of W0 in a Conv1D."""
    B1, A1, B2, A2 = factors
    if kind == "transposed":
        return Factors(B1, A1[:, start:stop], B2, A2[:, start:stop])
    return Factors(B1[start:stop], A1, B2[start:stop], A2)


def plan_tensors(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    adapters: Sequence[tuple[SavedAdapter, float]],
    kinds: Mapping[str, LayerKind],
    dtype: torch.dtype | None,
    quantised: Quantised | None,
) -> list[OutTensor]:
    """Say for every tensor of the merged checkpoint where it comes from.

    Args:
        checkpoint: The base.
        model: Its skeleton.
        adapters: The adapters and their weights.
        kinds: How each adapted layer stores its weight.
        dtype: Of all floating tensors; None keeps each tensor's own.
        quantised: Take the quantised layers as training saw them.

    Returns:
        The tensors in the base's order. Where an adapter changes one of two tied tensors, both stand in the list.

    Raises:
        ModelError: An adapted weight is not in the checkpoint, or not in one piece.
    """
    names = parameter_names(checkpoint.tensors, model)
    stored = {parameter: checkpoint.tensors[name] for name, parameter in names.items()}
    tied = tied_parameters(model)
    changed = {f"{layer}.weight" for adapter, _ in adapters for layer in adapter.layers}
    changed |= {name for adapter, _ in adapters for name in adapter.whole}
    for first, second in tied.items():
        if changed & {first, second}:
            for one, other in ((first, second), (second, first)):
                if one not in stored and other in stored:
                    stored[one] = stored[other]
    missing = sorted(changed - stored.keys())
    if missing:
        raise ModelError(
            f"{checkpoint.folder} does not store {missing[0]} as a tensor of its own ({len(missing)} such); this checkpoint has "
            "another layout than the model. Write it once with transformers' from_pretrained and save_pretrained, and name "
            "that with --base and --force"
        )
    layers = quantised_layers(model) if quantised else {}
    files = {id(adapter): read_file(adapter.path / ADAPTER_FILES[1])[0] for adapter, _ in adapters if adapter.whole}
    result = []
    for name, source, parameter in [
        *((name, source, names.get(name, name)) for name, source in checkpoint.tensors.items()),
        *((parameter, source, parameter) for parameter, source in stored.items() if parameter not in names.values()),
    ]:
        layer = parameter.removesuffix(".weight")
        floating = source.dtype in DTYPES or parameter in changed  # a changed one has to be; if it is not, that is an error
        updates = [(adapter, weight) for adapter, weight in adapters if layer in adapter.layers and parameter != layer]
        result.append(
            OutTensor(
                name=name,
                parameter=parameter,
                source=source,
                dtype=(dtype or source.torch_dtype) if floating else None,
                updates=updates,
                kind="transposed" if layers.get(layer) else kinds.get(layer, "linear"),
                whole=[
                    (files[id(adapter)][adapter.whole[parameter]], weight)
                    for adapter, weight in adapters
                    if parameter in adapter.whole
                ],
                quantised=quantised if layer in layers and parameter != layer else None,
            )
        )
    return result


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share one tensor, as transformers lists them: output layer -> embeddings."""
    return dict(model.all_tied_weights_keys or {})


def parameter_names(stored: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Map a checkpoint's tensor names to the model's parameters, for those that are loaded as they are.

    Hub checkpoints may leave out or add the base model's prefix (GPT-2's `h.0...` is `transformer.h.0...`), or have older names
    that transformers renames while loading.
    """
    known = model.state_dict()
    prefix = model.base_model_prefix
    names = {}
    left = []
    for name in stored:
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((one for one in candidates if one in known), None)
        if found:
            names[name] = found
        else:
            left.append(name)
    if left:
        # Not before it is needed: these names came with transformers 5 and may move.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        conversions = get_model_conversion_mapping(model)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in conversions if isinstance(one, WeightConverter)]
        for name in left:
            renamed, converted = rename_source_key(name, renamings, converters, prefix, known)
            if converted is None and renamed in known:
                names[name] = renamed
    return names
