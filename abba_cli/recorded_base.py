"""The base model that a saved adapter was trained on: recorded, resolved, and held against the adapter's layers."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import init_empty_weights
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from abba_cli.adapter.layer import weight_shape
from abba_cli.bases import Base, dequantised, find_base
from abba_cli.errors import ModelError
from abba_cli.loading import skeleton
from abba_cli.methods import without_start
from abba_cli.recipe import ModelSection
from abba_cli.saved_adapter import SavedAdapter, is_repeated

LayerKind = Literal["linear", "transposed", "convolution"]


@dataclass(frozen=True)
class RecordedBase:
    """What an adapter's files say about its base.

    Args:
        name: As the recipe named it; None where nothing was recorded.
        location: Where it was loaded from; differs from the name for packages and dequantised GGUF files.
        revision: Commit if one is known, else the branch or tag asked for.
        gguf_file: The GGUF that was dequantised into `location`.
        dtype: Of the base in training.
        quantization: Of the base in training: none, nf4 or int8.
    """

    name: str | None
    location: str | None
    revision: str | None
    gguf_file: str | None
    dtype: str
    quantization: str


def recorded_base(adapter: SavedAdapter) -> RecordedBase:
    """Read what the adapter's configuration and, for a run, its provenance say."""
    location = adapter.config.base_model_name_or_path
    base = adapter.provenance().get("base", {})
    return RecordedBase(
        name=base.get("name", location),
        location=location,
        revision=base.get("commit") or adapter.config.revision,
        gguf_file=base.get("gguf_file"),
        dtype=base.get("dtype", "bfloat16"),
        quantization=base.get("quantization", "none"),
    )


def resolve_base(
    adapters: Sequence[SavedAdapter], base: str | None = None, revision: str | None = None, force: bool = False
) -> Base:
    """Decide which base the adapters go on.

    Args:
        adapters: One or more.
        base: A hub id or directory in place of the recorded base.
        revision: Branch, tag or commit in place of the recorded one.
        force: Take a base that is not the recorded one.

    Raises:
        ModelError: None is recorded or named, it is another than the recorded one, or the adapters have different bases.
    """
    records = [recorded_base(adapter) for adapter in adapters]
    first = records[0]
    if not force:
        for adapter, other in zip(adapters[1:], records[1:], strict=True):
            if (other.location, other.revision) != (first.location, first.revision):
                raise ModelError(
                    f"the adapters have different bases: {adapters[0].path} was trained on {_named(first)}, {adapter.path} on "
                    f"{_named(other)}; give --base and --force if their weights are the same"
                )
    if base is None or _is_recorded(base, first):
        if first.location is None:
            raise ModelError(f"{adapters[0].path} does not say which base it was trained on; name it with --base")
        if revision not in (None, first.revision) and not force:
            raise ModelError(
                f"the adapter was trained on {_named(first)}, not on revision {revision}; leave --revision out, or give --force"
            )
        return _recorded(first, revision)
    if not force and first.location is not None:
        raise ModelError(
            f"the adapter was trained on {_named(first)}, not on {base}; leave --base out, or give --force if the weights are "
            "the same"
        )
    return find_base(ModelSection(name=base, revision=revision))


def _is_recorded(base: str, record: RecordedBase) -> bool:
    if base in (record.name, record.location):
        return True
    paths = [Path(base), Path(record.location or "")]
    return all(path.is_dir() for path in paths) and paths[0].samefile(paths[1])


def _recorded(record: RecordedBase, revision: str | None) -> Base:
    assert record.location is not None
    missing = Path(record.location).is_absolute() and not Path(record.location).is_dir()
    if missing and record.gguf_file and record.name:
        # The cache was emptied: the GGUF can be dequantised again, under the same name if it is the same file.
        section = ModelSection.model_validate({"name": record.name, "gguf_file": record.gguf_file, "dtype": record.dtype})
        again = dequantised(find_base(section), section)
        if Path(again.location).name != Path(record.location).name:
            raise ModelError(
                f"the adapter was trained on {record.location}, which is gone, and {record.gguf_file} has another content now; "
                "bring the old file back, or name a base with --base and --force"
            )
        return again
    if missing:
        raise ModelError(f"the recorded base {record.location} is not there any more; name it with --base and --force")
    return Base(record.location, revision or record.revision)


def _named(record: RecordedBase) -> str:
    named = record.location or "an unnamed base"
    return f"{named} (revision {record.revision})" if record.revision else named


def fit(adapter: SavedAdapter, config: PreTrainedConfig) -> Mapping[str, LayerKind]:
    """Hold an adapter against a base's skeleton, before any weight is read.

    Args:
        adapter: The adapter.
        config: The base's configuration.

    Returns:
        How each adapted layer stores its weight: (m, n), transposed (n, m), or as a convolution's kernel.

    Raises:
        ModelError: The adapter has layers that the base lacks, lacks layers that its targets match, or the shapes differ.
    """
    where, kind = config.name_or_path, type(config).__name__.removesuffix("Config")
    settings = copy.deepcopy(adapter.config)
    bare = skeleton(config, ModelSection(name="base"))
    settings.base_model_name_or_path, settings.revision = bare.name_or_path, None
    without_start(settings)
    known = dict(bare.named_modules())
    try:
        with init_empty_weights():
            adapted = get_peft_model(bare, settings)
    except (ValueError, TypeError, AttributeError, LookupError, re.error) as error:  # PEFT takes its settings as they come
        raise ModelError(
            f"{adapter.path} does not fit {where} ({kind}), a base of another architecture? {' '.join(str(error).split())[:200]}"
        ) from None
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = [key.removeprefix("base_model.model.") for key in state]
    foreign = [layer for layer in adapter.layers if layer not in known]
    foreign += [name for name in adapter.whole if name.rpartition(".")[0] not in known]
    if foreign:
        raise ModelError(
            f"{adapter.path} does not fit {where} ({kind}): the base has no {_some(foreign)}; is it of another architecture?"
        )
    missing = [name for name in expected if not is_repeated(name) and not adapter.holds(name)]
    if missing:
        raise ModelError(f"{adapter.path} holds half an adapter: {_some(missing)} missing for {where}")
    kinds: dict[str, LayerKind] = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and name in adapter.layers:
            layer, (m, n) = adapter.layers[name], weight_shape(module.get_base_layer())
            if (layer.m, layer.n) != (m, n):
                raise ModelError(
                    f"{adapter.path} does not fit {where}: {name} is {m} x {n} there, the adapter is for {layer.m} x {layer.n}"
                )
            inner = module.get_base_layer()
            kinds[name] = "transposed" if isinstance(inner, Conv1D) else "linear"
            if isinstance(inner, nn.Conv1d):
                kinds[name] = "convolution"
    untargeted = [layer for layer in adapter.layers if layer not in kinds]
    if untargeted:
        raise ModelError(f"{adapter.path}: adapter_config.json does not target {_some(untargeted)} although the file has factors")
    return kinds


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
