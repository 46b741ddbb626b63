"""The settings of a saved adapter, adapter_config.json, held against what abba knows of its method."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from peft import PeftConfig
from pydantic import TypeAdapter, ValidationError

from abba_cli.adapter import AbbaConfig
from abba_cli.errors import ModelError
from abba_cli.rundir import ADAPTER_FILES


def check_plain(path: Path, settings: Mapping[str, Any], kind: type[PeftConfig]) -> None:
    """Refuse settings of a method that change what its tensors mean, or that would have PEFT import something."""
    for one in fields(kind):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        value = settings.get(one.name, default)
        if one.name == "init_lora_weights" and value in ("gaussian", "orthogonal"):
            continue  # other starts by name, such as PiSSA's, change the base as well
        if one.name not in _UNDERSTOOD and value and value != default and not one.name.startswith("runtime"):
            raise ModelError(f"{path}: {one.name} is {str(value)[:60]!r} in its adapter_config.json, which abba does not read")


_UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *(
        "pairs",
        "scale_exponent",
        "lora_dropout",
        "hira_dropout",
        "rank_dropout",
        "module_dropout",
        "use_effective_conv2d",
        "init_weights",
    ),
}


def check_types(path: Path, settings: Mapping[str, Any]) -> None:
    """Hold the settings against the types that AbbaConfig declares: PEFT takes whatever is in the file."""
    for name, kind in get_type_hints(AbbaConfig).items():
        if name in (*AbbaConfig.__annotations__, "base_model_name_or_path", "revision") and name in settings:
            try:
                TypeAdapter(kind).validate_python(settings[name], strict=True)
            except ValidationError:
                shown = repr(settings[name])[:60]
                raise ModelError(f"{path / ADAPTER_FILES[0]} is broken: {name} is {shown}; bring a good copy back") from None


@contextmanager
def plausible(path: Path) -> Iterator[None]:
    """Turn what a configuration with values of a wrong kind raises, wherever it is used, into a ModelError."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError, re.error) as error:
        raise ModelError(f"{path / ADAPTER_FILES[0]} is broken: {error}; bring a good copy back") from error
