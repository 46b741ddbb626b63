"""Adapters of other programs that are the same function as an ABBA adapter, read and checked without running their code.

Three formats: the released code of the paper (https://github.com/CERT-Lab/abba, abba.py, `save_pretrained`), LoHa as PEFT writes
it, and LoHa as LyCORIS writes it (https://github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/loha.py).

Shapes: W0 is (m, n); B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n). LoHa calls them hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b,
with one rank for both pairs.
"""

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from abba_cli.adapter import Factors
from abba_cli.errors import ModelError

_AUTHORS = {"B1": "lora_B1", "A1": "lora_A1", "B2": "lora_B2", "A2": "lora_A2"}
_HADAMARD = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What unpickling damaged bytes ends in.
_DAMAGED = (SafetensorError, OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)
_EXPECTED = "expected keys such as MODULE.lora_A1.default (the authors' ABBA), or MODULE.hada_w1_a (LoHa of PEFT or LyCORIS)"


class ForeignLayer(NamedTuple):
    """One layer: dW = s (B1 A1) * (B2 A2), with the factors as stored."""

    factors: Factors
    s: float


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another program.

    Args:
        path: The file or folder it was read from.
        format: Which program's, in words.
        layers: By module name as the file has it.
        whole: Parameters that were trained whole (PEFT's modules_to_save), by their keys in the file.
        modules_to_save: The names behind `whole`.
    """

    path: Path
    format: str
    layers: Mapping[str, ForeignLayer]
    whole: Mapping[str, torch.Tensor]
    modules_to_save: list[str] | None


def read_foreign(path: Path) -> ForeignAdapter:
    """Read an adapter and find out which format it has.

    Args:
        path: A folder with weights and, except for LyCORIS, adapter_config.json; or the file of weights.

    Raises:
        ModelError: There is none, its format is unknown, it is a pickle with code, half of it is missing, or it cannot be an ABBA
            adapter (DoRA's scales, Tucker tensors, values that are no numbers).
    """
    file = _weights_file(path)
    settings = _settings(file.with_name("adapter_config.json"))
    tensors = _tensors(file)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{file}: {key} holds NaN or infinity; the adapter is broken")
    method = settings.get("peft_type")
    if method == "ABBA":
        raise ModelError(f"{path} is an ABBA adapter of this program already; use it as it is")
    try:
        if any(f".{part}" in key for key in tensors for part in _AUTHORS.values()):
            return _authors(path, tensors, settings)
        if any(key.endswith(f".{part}") for key in tensors for part in _HADAMARD.values()):
            return _peft(path, tensors, settings) if method == "LOHA" else _lycoris(path, tensors)
    except (*_DAMAGED, re.error) as error:
        raise ModelError(f"{path} is broken: {' '.join(str(error).split())[:200]}; bring a good copy back") from error
    raise ModelError(f"{file} has an unknown format: found {_some(list(tensors)) or 'no tensors'}; {_EXPECTED}")


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"there is no {path}; expected the folder of an adapter, or its file of weights")
    found = [path / name for name in _WEIGHTS if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) == 1 or (found and found[0].name in _WEIGHTS):
        return found[0]
    if found:
        raise ModelError(f"{path} holds several files of weights: {_some([one.name for one in found])}; name the one to import")
    names = _some(sorted(one.name for one in path.iterdir())) or "nothing"
    what = "half an adapter" if (path / "adapter_config.json").is_file() else "no adapter"
    raise ModelError(f"{path} holds {what}: expected {' or '.join(_WEIGHTS)}, found {names}")


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {file}: {error}") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{file} holds {type(settings).__name__}; expected the settings of an adapter")
    return settings


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file} is no pickle of tensors alone; what else it holds could run code, so it is not read. Load it where you "
            "trust it, and save its tensors as adapter_model.safetensors"
        ) from None
    except _DAMAGED as error:
        raise ModelError(f"cannot read {file}: {' '.join(str(error).split())[:200]}; is the file cut short?") from None
    if not isinstance(loaded, dict) or not all(isinstance(one, torch.Tensor) for one in loaded.values()):
        found = (
            f"{type(loaded).__name__} of {_some(list(map(str, loaded)))}" if isinstance(loaded, dict) else type(loaded).__name__
        )
        raise ModelError(f"{file} holds {found}; {_EXPECTED}")
    return {str(key): tensor for key, tensor in loaded.items()}


def _authors(path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> ForeignAdapter:
    """s = sqrt(alpha1) sqrt(alpha2), with no rank in it. Ranks are the tensors' own: the released code gives both pairs pair 1's
    shapes, and no rank above min(m, n), whatever r1 and r2 in the configuration say."""
    if not settings:
        raise ModelError(f"{path} holds half an adapter: adapter_config.json is missing, and with it the scale")
    alphas = [_positive(path, name, settings.get(name)) for name in ("alpha1", "alpha2")]
    s = math.sqrt(alphas[0]) * math.sqrt(alphas[1])
    parts: dict[str, torch.Tensor] = {}
    adapters = set()
    for key, tensor in tensors.items():
        layer, _, rest = key.rpartition(".lora_")
        factor, _, adapter = rest.removesuffix(".weight").partition(".")
        if not layer or f"lora_{factor}" not in _AUTHORS.values():
            raise ModelError(f"{path}: {key} has no place in an ABBA adapter; {_EXPECTED}")
        adapters.add(adapter)
        parts[f"{layer}.lora_{factor}"] = tensor
    if len(adapters) > 1:
        raise ModelError(f"{path} holds several adapters: {_some(sorted(adapters))}; expected one")
    layers = _layers(path, parts, _AUTHORS, lambda name, rank: s)
    return ForeignAdapter(path, "the authors' ABBA", layers, {}, None)


def _peft(path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> ForeignAdapter:
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}

    def scale(name: str, rank: int) -> float:
        inner = name.removeprefix("base_model.model.")
        expected = ranks.get(get_pattern_key(list(ranks), inner), settings.get("r"))
        if rank != expected:
            raise ModelError(
                f"{path}: {name} has rank {rank}, adapter_config.json says {expected}; the two files do not belong together"
            )
        return _positive(path, "alpha", alphas.get(get_pattern_key(list(alphas), inner), settings.get("alpha"))) / rank

    parts = {key: tensor for key, tensor in tensors.items() if ".hada_" in key}
    whole = {key: tensor for key, tensor in tensors.items() if ".hada_" not in key}
    saved = settings.get("modules_to_save") or []
    stray = [key for key in whole if not any(f".{name}." in f".{key}" for name in saved)]
    if stray:
        raise ModelError(f"{path}: {_some(stray)} belongs to no modules_to_save of adapter_config.json")
    return ForeignAdapter(path, "LoHa (PEFT)", _layers(path, parts, _HADAMARD, scale), whole, saved or None)


def _lycoris(path: Path, tensors: Mapping[str, torch.Tensor]) -> ForeignAdapter:
    """s = alpha / r, with an alpha for each module. That a module was trained with rs_lora is not in the file."""
    alphas = {key.removesuffix(".alpha"): tensor for key, tensor in tensors.items() if key.endswith(".alpha")}

    def scale(name: str, rank: int) -> float:
        if name not in alphas:
            raise ModelError(f"{path} holds half an adapter: {name}.alpha is missing, and with it the scale")
        return _positive(path, f"{name}.alpha", float(alphas[name])) / rank

    parts = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    return ForeignAdapter(path, "LoHa (LyCORIS)", _layers(path, parts, _HADAMARD, scale), {}, None)


def _layers(
    path: Path, parts: Mapping[str, torch.Tensor], names: Mapping[str, str], scale: Callable[[str, int], float]
) -> dict[str, ForeignLayer]:
    """Put the factors together, layer by layer; `scale` gets a layer's name and r1."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    letters = {name: letter for letter, name in names.items()}
    reasons = {
        "dora_scale": "DoRA's scales, which have no ABBA form",
        "hada_t1": "a Tucker tensor, which has no ABBA form",
        "hada_t2": "a Tucker tensor, which has no ABBA form",
    }
    for key, tensor in parts.items():
        layer, _, name = key.rpartition(".")
        if name not in letters:
            raise ModelError(f"{path}: {key} is {reasons.get(name, 'no part of this format')}; it cannot be imported")
        if tensor.dim() != 2:
            raise ModelError(f"{path}: {key} has the shape {tuple(tensor.shape)}; expected a matrix")
        factors.setdefault(layer, {})[letters[name]] = tensor
    missing = [f"{layer}.{names[one]}" for layer, found in factors.items() for one in names if one not in found]
    if missing:
        raise ModelError(f"{path} holds half an adapter: {_some(missing)} missing")
    layers = {}
    for layer, found in factors.items():
        B1, A1, B2, A2 = (found[letter] for letter in Factors._fields)
        if B1.shape[1] != A1.shape[0] or B2.shape[1] != A2.shape[0] or len(B1) != len(B2) or A1.shape[1] != A2.shape[1]:
            shapes = ", ".join(f"{names[one]} {' x '.join(map(str, found[one].shape))}" for one in names)
            raise ModelError(f"{path}: the factors of {layer} do not fit each other: {shapes}")
        layers[layer] = ForeignLayer(Factors(B1, A1, B2, A2), scale(layer, len(A1)))
    return layers


def _positive(path: Path, name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"{path}: {name} is {'missing' if value is None else value}; expected a positive number, for the scale")
    return float(value)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
