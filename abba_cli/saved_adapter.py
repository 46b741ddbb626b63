"""A trained adapter on disk: found, read lazily, and checked before anything long is done with it.

Shapes: an adapted layer's frozen weight W0 is (m, n); its factors are B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from abba_cli.adapter import Factors
from abba_cli.dense_methods import two_pairs
from abba_cli.errors import ModelError
from abba_cli.hub import explain
from abba_cli.methods import CONFIGS, method_of, ranks_and_scale
from abba_cli.rundir import ADAPTER_FILES, RunDir
from abba_cli.saved_settings import check_plain, check_types, plausible

Update = Literal["added", "multiplied", "normalised"]

_PREFIX = "base_model.model."
_FACTORS = {
    "ABBA": ("abba_B1", "abba_A1", "abba_B2", "abba_A2"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LORA": ("lora_B.weight", "lora_A.weight"),
    "HIRA": ("hira_B", "hira_A"),
    "FULL": ("full_delta",),
    "CHAIN": ("chain_pair_B", "chain_pair_A"),
}
_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class SavedLayer:
    """One adapted layer: W0 is (m, n), and the update s (B1 A1) * (B2 A2); a single pair has a second one of ones (r2 = 1).

    Full fine-tuning is a pair with a unit matrix, and a chain of pairs has those that are `two_pairs` of it.
    """

    name: str
    m: int
    n: int
    r1: int
    r2: int
    s: float


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in PEFT's form, ABBA's or one to compare with it; tensors are read when they are asked for.

    Args:
        path: The local folder that holds it.
        config: Its settings; `base_model_name_or_path` and `revision` are the recorded base.
        update: What happens to W0 with the product D = s (B1 A1) * (B2 A2): W0 + D is added, W0 + W0 * D multiplied (HiRA), and
            W0 + D with its rows brought to trained lengths normalised (DoRA).
        layers: The adapted layers, by their module's name in the base model.
        whole: Parameters trained whole (modules_to_save, biases): the parameter's name in the base model -> its key in the file.
    """

    path: Path
    config: Any  # a PeftConfig, whose fields depend on the method
    update: Update
    layers: Mapping[str, SavedLayer]
    whole: Mapping[str, str]

    def factors(self, layer: str) -> Factors:
        """The four factors of a layer, as stored."""
        with safe_open(self.path / ADAPTER_FILES[1], "pt") as file:
            stored = [file.get_tensor(f"{_PREFIX}{layer}.{one}") for one in _FACTORS[self.method]]
        if self.method == "CHAIN":
            return two_pairs(*stored)
        if self.method == "FULL":  # dW = dW I, or I dW
            m, n = stored[0].shape
            stored = [*stored, torch.eye(n).to(stored[0])] if n <= m else [torch.eye(m).to(stored[0]), *stored]
        if len(stored) == 2:
            B, A = stored
            return Factors(B, A, B.new_ones(len(B), 1), A.new_ones(1, A.shape[1]))
        return Factors(*stored)

    def magnitude(self, layer: str) -> torch.Tensor:
        """The lengths (m,) of a normalised layer's rows."""
        with safe_open(self.path / ADAPTER_FILES[1], "pt") as file:
            return file.get_tensor(f"{_PREFIX}{layer}.{_MAGNITUDE}")  # type: ignore[no-any-return]

    def holds(self, name: str) -> bool:
        """Whether it has a parameter of an adapted model, by the name in PEFT's file without the prefix."""
        layer, _ = _split(self.method, name)
        return layer in self.layers if layer else name.replace(".base_layer.", ".") in self.whole

    @property
    def method(self) -> str:
        """PEFT's name of it, one of CONFIGS."""
        return method_of(self.config)

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter that was trained whole, by its name in the base model."""
        with safe_open(self.path / ADAPTER_FILES[1], "pt") as file:
            return file.get_tensor(self.whole[name])  # type: ignore[no-any-return]

    @property
    def run(self) -> RunDir | None:
        """The run that it belongs to (a checkpoint's is the run above it), or None for an adapter that came without."""
        above = self.path.absolute().parent.parent
        is_checkpoint = RunDir(above).checkpoints == self.path.absolute().parent
        run = RunDir(above if is_checkpoint else self.path)
        return run if run.is_run else None

    @property
    def template(self) -> str | None:
        """Name of the prompt template that it was trained with, or None where no recipe came along."""
        return self.run.recipe().data.template if self.run and self.run.recipe_file.is_file() else None

    def provenance(self) -> dict[str, Any]:
        """What the run recorded about itself, or {} for an adapter that came without."""
        return self.run.provenance() if self.run else {}


def find_adapter(source: str) -> Path:
    """Find the folder of a saved adapter.

    Args:
        source: A run directory, an adapter directory, a folder of runs (its newest finished run is taken), or a hub id.

    Raises:
        ModelError: There is none; the message says what was found instead.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _in_folder(folder)
    if folder.is_file():
        raise ModelError(f"{source} is a file; expected the directory of a run or an adapter, or a hub id")
    if folder.is_absolute() or source.startswith((".", "~")) or source.rstrip("/").count("/") != 1 or source.endswith("/"):
        raise ModelError(
            f"there is no directory {source}; expected a run, an adapter, a folder of runs, or a hub id (OWNER/NAME)"
        )
    with explain(f"adapter {source}", page=source):
        # Only what the commands read: no optimizer states, no pickles.
        wanted = ["*.json", "adapter_model.safetensors", "*.jinja", "recipe.yaml", "tokenizer*", "*.model"]
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"]))


def _in_folder(folder: Path) -> Path:
    has = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if len(has) == len(ADAPTER_FILES):
        return folder
    if has:
        missing = next(name for name in ADAPTER_FILES if name not in has)
        if (folder / "adapter_model.bin").is_file():
            raise ModelError(
                f"{folder} holds a pickled adapter (adapter_model.bin), which can run code and is not read here; convert it "
                f"once with `abba import {folder} --base MODEL --output DIR`"
            )
        raise ModelError(f"{folder} holds half an adapter: {has[0]} is there, {missing} is missing")
    run = RunDir(folder)
    if run.is_run:
        checkpoints = run.complete_checkpoints()
        advice = f"or name a checkpoint, such as {checkpoints[-1]}" if checkpoints else "it has no complete checkpoint yet"
        raise ModelError(f"the run in {folder} has not finished; run `abba train` again to finish it, {advice}")
    finished = [one for one in map(RunDir, sorted(folder.iterdir())) if one.path.is_dir() and one.is_run and one.finished]
    if not finished:
        below = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"there is no adapter in {folder}: expected {' and '.join(ADAPTER_FILES)}, or finished runs below it; found {below}"
        )
    return max(finished, key=lambda one: one.provenance_file.stat().st_mtime).path


def open_adapter(path: Path) -> SavedAdapter:
    """Read a saved adapter's configuration and the shapes of its tensors, and make sure that it is whole.

    Raises:
        ModelError: It is of another method, a tensor is missing, has another shape than its partners, or holds NaN or infinity.
    """
    with explain(str(path / ADAPTER_FILES[0])):
        settings = json.loads((path / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        method = settings.get("peft_type") if isinstance(settings, dict) else None
        if not isinstance(method, str) or method not in CONFIGS:
            raise ModelError(
                f"{path} holds {f'a {str(method)[:40]}' if method else 'no PEFT'} adapter; expected an ABBA one, or one of "
                f"{', '.join(name for name in CONFIGS if name != 'ABBA')} (`abba import` reads LyCORIS's and the authors')"
            )
        check_types(path, settings) if method == "ABBA" else check_plain(path, settings, CONFIGS[method])
        with plausible(path):
            config = PeftConfig.from_pretrained(str(path))
    shapes = _shapes(path)
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    whole = {}
    for key, shape in shapes.items():
        name = key.removeprefix(_PREFIX)
        if is_repeated(name):
            continue
        layer, factor = _split(method, name)
        if layer:
            factors.setdefault(layer, {})[factor] = shape
        else:
            whole[name.replace(".base_layer.", ".")] = key
    update: Update = "multiplied" if method == "HIRA" else "normalised" if getattr(config, "use_dora", False) else "added"
    needed = (*_FACTORS[method], *([_MAGNITUDE] if update == "normalised" else []))
    missing = [f"{layer}.{one}" for layer, found in factors.items() for one in needed if one not in found]
    if missing or not factors:
        raise ModelError(f"{path} holds half an adapter: {_some(missing) if missing else 'factors'} missing")
    with plausible(path):
        layers = {layer: _layer(path, config, layer, found) for layer, found in factors.items()}
    return SavedAdapter(path, config, update, layers, whole)


def _split(method: str, name: str) -> tuple[str, str]:
    """Layer and factor of a name in the file; two empty texts for what is no factor."""
    for factor in (*_FACTORS[method], _MAGNITUDE):
        if name.endswith(f".{factor}"):
            return name[: -len(factor) - 1], factor
    return "", ""


def is_repeated(name: str) -> bool:
    """Whether a tensor stands in the file under another name, too.

    With `bias="all"` PEFT 0.21.2 writes the biases of a module that is trained whole a second and a third time.
    """
    return ".modules_to_save." in name or ".original_module." in name


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, read together with a look for values that are no numbers."""
    file_path = path / ADAPTER_FILES[1]
    shapes = {}
    try:
        with safe_open(file_path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                tensor = file.get_tensor(key)
                if not tensor.isfinite().all():
                    raise ModelError(f"{file_path}: {key} holds NaN or infinity; the adapter is broken, train it again")
                shapes[key] = tuple(tensor.shape)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {file_path}: {error}; the file is cut short or no safetensors file") from None
    return shapes


def _layer(path: Path, config: PeftConfig, name: str, found: Mapping[str, tuple[int, ...]]) -> SavedLayer:
    method = method_of(config)
    letters = _FACTORS[method]
    if method == "FULL":
        m, n, *others = found[letters[0]]
        if others:
            raise ModelError(f"{path}: {name}.{letters[0]} is {_by(found[letters[0]])}, expected a matrix; the file is broken")
        return SavedLayer(name, m, n, min(m, n), 1, 1.0)
    r1, r2, s = ranks_and_scale(config, name)
    first, last = found[letters[0]], found[letters[1]]
    m, n = first[-2 if method == "CHAIN" else 0], last[-1]
    shapes: tuple[tuple[int, ...], ...] = ((m, r1), (r1, n), (m, r2), (r2, n))
    if method == "CHAIN":
        shapes = ((config.pairs, m, config.r), (config.pairs, config.r, n))  # type: ignore[attr-defined]
    for factor, shape in [*zip(letters, shapes, strict=False), *([(_MAGNITUDE, (m,))] if _MAGNITUDE in found else [])]:
        if found[factor] != shape:
            raise ModelError(
                f"{path}: {name}.{factor} is {_by(found[factor])}, expected {_by(shape)} from the ranks {r1}"
                f"{f' and {r2}' if len(letters) > 2 else ''} in adapter_config.json; the two files do not belong together"
            )
    return SavedLayer(name, m, n, r1, r2, s)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more + (" are" if len(names) > 1 else " is")
