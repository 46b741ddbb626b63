"""ABBA as a PEFT method: importing this package makes PEFT know `AbbaConfig`."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, mapping
from peft.tuners import mixed
from peft.tuners.mixed import model as mixed_model
from peft.utils import PeftType, register_peft_method

from .peft_types import add_peft_type

add_peft_type("ABBA")  # before the imports below, which use the new member

from .config import AbbaConfig  # noqa: E402
from .factors import Factors, delta_weight, khatri_rao, scale  # noqa: E402
from .layer import AbbaLayer  # noqa: E402
from .linear import AbbaLinear  # noqa: E402
from .model import AbbaModel, svd_progress  # noqa: E402


def _register() -> None:
    """Tells PEFT which classes ABBA consists of. Does nothing the second time."""
    if PeftType("ABBA") not in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="abba", config_cls=AbbaConfig, model_cls=AbbaModel, is_mixed_compatible=True)
    if PeftType("ABBA") not in mixed.COMPATIBLE_TUNER_TYPES:
        _join_mixed_models()


def _join_mixed_models() -> None:
    """Makes `get_peft_model(..., mixed=True)` accept ABBA: PEFT 0.21.2 lists the methods it mixes by hand."""
    # Two names for the tuple: `PeftMixedModel` reads the package's, `MixedModel` its own module's.
    package: Any = mixed
    module: Any = mixed_model
    package.COMPATIBLE_TUNER_TYPES = (*package.COMPATIBLE_TUNER_TYPES, PeftType("ABBA"))
    module.COMPATIBLE_TUNER_TYPES = package.COMPATIBLE_TUNER_TYPES
    module.PREFIXES.append(AbbaModel.prefix)
    module.Configs = module.Configs | AbbaConfig
    module.Layers = (*module.Layers, AbbaLayer)
    create_and_replace = module.MixedModel._create_and_replace

    def create_and_replace_abba(self: Any, config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, AbbaConfig):
            AbbaModel._create_and_replace(self, config, *args, **kwargs)
        else:
            create_and_replace(self, config, *args, **kwargs)

    module.MixedModel._create_and_replace = create_and_replace_abba


_register()

__all__ = [
    "AbbaConfig",
    "AbbaLayer",
    "AbbaLinear",
    "AbbaModel",
    "Factors",
    "delta_weight",
    "khatri_rao",
    "scale",
    "svd_progress",
]
