"""`abba import`: an adapter of another program becomes an ABBA adapter on a given base, with the same update.

Shapes: an adapted layer's frozen weight W0 is (m, n); its factors are B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from abba_cli.adapter import AbbaConfig
from abba_cli.adapter.layer import weight_shape
from abba_cli.bases import Base
from abba_cli.errors import ModelError
from abba_cli.foreign import ForeignAdapter, ForeignLayer, read_foreign
from abba_cli.loading import load_config, skeleton
from abba_cli.outputs import new_directory, place, write_card
from abba_cli.recipe import ModelSection
from abba_cli.recorded_base import fit
from abba_cli.rundir import ADAPTER_FILES
from abba_cli.saved_adapter import SavedAdapter, open_adapter

_PREFIX = "base_model.model."
_WRAPPERS = ("base_model", "model", "module", "_orig_mod")


def import_adapter(source: Path, base: Base, output: Path, overwrite: bool = False) -> SavedAdapter:
    """Read an adapter of another program and write it as an ABBA adapter.

    Args:
        source: Its folder, or its file of weights; the formats are those of `abba_cli.foreign`.
        base: The model that it was trained on, which the files do not say reliably.
        output: The directory to be.
        overwrite: Replace one that a command of ours has made.

    Raises:
        ModelError: As `read_foreign`, or the adapter does not fit the base.
        RunError: The output exists or cannot be written.
    """
    return write_imported(read_foreign(source), base, output, overwrite)


def write_imported(foreign: ForeignAdapter, base: Base, output: Path, overwrite: bool = False) -> SavedAdapter:
    """Write an adapter that has been read; arguments and errors as in `import_adapter`.

    The factors are written in float32, or as they are where that is not wide enough, so that none changes.
    """
    settings = load_config(base, ModelSection(name=base.location))
    modules = dict(skeleton(settings, ModelSection(name="base")).named_modules())
    layers = _on_base(foreign, modules, base)
    tensors = {}
    for name, layer in layers.items():
        for letter, factor in zip(layer.factors._fields, layer.factors, strict=True):
            tensors[f"{_PREFIX}{name}.abba_{letter}"] = factor.to(torch.promote_types(factor.dtype, torch.float32)).contiguous()
    config = _config(foreign, base, layers, modules)
    record = {"command": "import", "source": str(foreign.path), "format": foreign.format, "base": base.location}
    output = place(output)
    with new_directory(output, overwrite, record, [foreign.path]) as folder:
        config.save_pretrained(str(folder))
        save_file({**tensors, **foreign.whole}, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
        fit(open_adapter(folder), settings)
        paper = "[arXiv 2505.14238](https://arxiv.org/abs/2505.14238)"
        text = f"An ABBA adapter ({paper}), made of one in {foreign.format} by `abba import`."
        write_card(folder, output.name, base.location, "peft", ["abba", "peft"], text)
    return open_adapter(output)


def _on_base(foreign: ForeignAdapter, modules: Mapping[str, nn.Module], base: Base) -> dict[str, ForeignLayer]:
    """The layers under the names of the base's modules."""
    underscored = foreign.format == "LoHa (LyCORIS)"
    adaptable = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D, nn.Conv1d))]
    layers: dict[str, ForeignLayer] = {}
    for given, layer in foreign.layers.items():
        found = _match_underscored(given, adaptable) if underscored else _match_dotted(given, adaptable)
        if not found:
            raise ModelError(
                f"{foreign.path} does not fit {base.location}: the base has no linear layer {given}; is it of another "
                "architecture?"
            )
        name = found[0]
        if len(found) > 1 or name in layers:
            raise ModelError(f"{foreign.path}: {given} could be more than one layer of {base.location}: {', '.join(found[:4])}")
        m, n = weight_shape(modules[name])
        B1, A1 = layer.factors.B1, layer.factors.A1
        if (len(B1), A1.shape[1]) != (m, n):
            raise ModelError(
                f"{foreign.path} does not fit {base.location}: {name} is {m} x {n} there, the adapter is for {len(B1)} x "
                f"{A1.shape[1]}"
            )
        layers[name] = layer
    return layers


def _match_dotted(given: str, names: Iterable[str]) -> list[str]:
    """A name as it is, without the wrappers it was saved through, or inside the model that the base wraps."""
    known = set(names)
    name = given
    while name not in known:
        head, _, rest = name.partition(".")
        if head not in _WRAPPERS or not rest:
            break
        name = rest
    if name in known:
        return [name]
    return sorted(one for one in known if one.partition(".")[2] == name)


def _match_underscored(given: str, names: Iterable[str]) -> list[str]:
    """A name as LyCORIS writes it, with a prefix and underscores for dots; or inside the model that the base wraps."""
    name = given.removeprefix("lycoris_").replace(".", "_")
    known = {one: one.replace(".", "_") for one in names}
    exact = [one for one, flat in known.items() if flat == name]
    return exact or [one for one in known if one.partition(".")[2].replace(".", "_") == name]


def _config(
    foreign: ForeignAdapter, base: Base, layers: Mapping[str, ForeignLayer], modules: Mapping[str, nn.Module]
) -> AbbaConfig:
    ranks = {name: (len(layer.factors.A1), len(layer.factors.A2)) for name, layer in layers.items()}
    # s = alpha^2 / sqrt(r1 r2), solved for alpha
    alphas = {name: math.sqrt(layer.s * math.sqrt(math.prod(ranks[name]))) for name, layer in layers.items()}
    usual, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    location = str(Path(base.location).absolute()) if Path(base.location).is_dir() else base.location
    return AbbaConfig(
        r1=usual[0],
        r2=usual[1],
        alpha=alpha,
        rank_pattern={_exactly(name): list(pair) for name, pair in ranks.items() if pair != usual},
        alpha_pattern={_exactly(name): one for name, one in alphas.items() if one != alpha},
        target_modules=target_names(layers, modules),
        modules_to_save=foreign.modules_to_save,
        task_type="CAUSAL_LM",
        base_model_name_or_path=location,
        revision=base.revision,
        inference_mode=True,
    )


def target_names(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of names by which PEFT finds the targets and no other module.

    Args:
        targets: Names of the modules to adapt.
        modules: Names of all modules.
    """
    wanted = set(targets)
    taken = {end for name in modules if name not in wanted for end in _ends(name)}
    chosen: set[str] = set()
    for name in sorted(wanted):
        ends = _ends(name)
        if not chosen & set(ends):
            # A whole name that ends another module's name is left: no list of names can tell those two apart.
            chosen.add(next((end for end in ends if end not in taken), name))
    return sorted(chosen)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _exactly(name: str) -> str:
    """A key of rank_pattern and alpha_pattern that matches this module alone; PEFT matches ends of names otherwise."""
    return "^" + name.replace(".", r"\.")
