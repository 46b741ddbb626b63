"""The PEFT tuner that puts ABBA layers into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import AbbaConfig
from .conv import AbbaConv1d
from .layer import AbbaLayer
from .linear import AbbaLinear

Progress = Callable[[int, int], None]
_progress: ContextVar[Progress | None] = ContextVar("abba_svd_progress", default=None)


@contextmanager
def svd_progress(callback: Progress) -> Iterator[None]:
    """Has `callback(done, total)` called, in layers, while adapters attached in this block get their SVD start.

    It is called with done = 0 first; and not at all when no SVD runs, as for a loaded adapter.
    """
    token = _progress.set(callback)
    try:
        yield
    finally:
        _progress.reset(token)


class AbbaModel(BaseTuner):
    """A model with ABBA adapters; made by `peft.get_peft_model` from an `AbbaConfig`."""

    prefix: str = "abba_"
    tuner_layer_cls = AbbaLayer
    # The same names as for every PEFT method that adapts linear layers.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter's layers into the model, then initialises them together: only now their number is known."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if config.read_from_file or config.inference_mode:
            return  # its weights are about to be loaded; AbbaLayer.initialize_pending tells what happens otherwise
        layers = [
            module
            for module in model.modules()
            if isinstance(module, AbbaLayer) and adapter_name in module.pending_svd and not module.abba_A1[adapter_name].is_meta
        ]
        report = _progress.get() or (lambda done, total: None)
        if layers:
            report(0, len(layers))
        for done, layer in enumerate(layers, start=1):
            layer.initialize_pending(adapter_name)
            report(done, len(layers))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates text as the model does, at the merged model's speed: see decoding.py.

        Each float layer's weight is made once, before the prompt, and used without further looks until the text is complete. In
        training mode, under autocast or where memory is short it is the model's own `generate`.
        """
        layers = [module for module in self.model.modules() if isinstance(module, AbbaLinear)]
        device = next(self.model.parameters()).device
        settle = not self.model.training and not torch.is_autocast_enabled(device.type)
        try:
            with torch.no_grad():
                for layer in layers if settle else ():
                    layer.settle()
            return self.model.generate(*args, **kwargs)
        finally:
            for layer in layers:
                layer.unsettle()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keeps the factors in float32, or gives them the base's dtype when `autocast_adapter_dtype` is off.

        Other methods start in the base's dtype and are cast up here, which would round the SVD of a bfloat16 base.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, AbbaLayer):
                    module.cast_factors_to_base(adapter_name)

    def _create_and_replace(  # type: ignore[override]
        self,
        config: AbbaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r1, r2 = config.ranks_for(get_pattern_key(list(config.rank_pattern or {}), current_key))
        alphas = config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), current_key), config.alpha)
        if isinstance(target, AbbaLayer):
            target.update_layer(adapter_name, config, r1=r1, r2=r2, alpha=alpha)
            return
        kwargs = get_quantization_kwargs(self)
        new_module = AbbaModel._create_new_module(config, adapter_name, target, r1=r1, r2=r2, alpha=alpha, **kwargs)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # a further adapter is not trained until it is activated
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(config: AbbaConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> AbbaLayer:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        return _layer_class(base_layer)(target, adapter_name, config, **kwargs)


def _layer_class(base_layer: nn.Module) -> type[AbbaLayer]:
    if isinstance(base_layer, (nn.Linear, Conv1D)):
        return AbbaLinear
    if isinstance(base_layer, nn.Conv1d):
        return AbbaConv1d
    backend = resolve_quantization_backend(base_layer)
    if backend is not None and backend.layer_type == "linear":
        return AbbaLinear
    raise ValueError(
        f"Target module {base_layer} is not supported. ABBA adapts `torch.nn.Linear`, `torch.nn.Conv1d` and "
        "`transformers.pytorch_utils.Conv1D`, and quantised linear layers that PEFT can dequantise."
    )
