"""An ABBA adapter as a LoRA adapter of llama.cpp, in GGUF: exact at rank r1 r2, or the best approximation of a smaller rank.

Shapes: an adapted layer's frozen weight W0 is (m, n); A is (r, n) and B (m, r), with the scale s baked into B.

Names, keys and the order of rows are those of llama.cpp's own converters:
https://github.com/ggml-org/llama.cpp/blob/0b03adaa632b76c7651dd1f6fa3b7a0b5eda479c/convert_lora_to_gguf.py
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from abba_cli.disk import disk_errors
from abba_cli.errors import ModelError
from abba_cli.export.lora import Dtype, LoraLayer, exact_rank, lora_layers
from abba_cli.recorded_base import LayerKind
from abba_cli.saved_adapter import SavedAdapter

Progress = Callable[[int, int], None]


class _Architecture(NamedTuple):
    """How llama.cpp holds a model.

    Args:
        name: Its name in GGUF.
        permuted: Whether the rows of q and k are reordered, because rotary embeddings turn neighbours there and halves in
            transformers.
    """

    name: str
    permuted: bool


# By transformers' model_type. In llama.cpp's converter these are the classes that map a layer's weight to one tensor, and of them
# those with `undo_permute` are permuted. Phi-3's fused projections have the same layout on both sides. Each is held by a test
# with llama.cpp itself.
# https://github.com/ggml-org/llama.cpp/tree/7bca1fd9ca2a681b0182e16f24f832b7be1942af/conversion
_ARCHITECTURES = {
    "gemma": _Architecture("gemma", False),
    "gemma2": _Architecture("gemma2", False),
    "gemma3_text": _Architecture("gemma3", False),
    "llama": _Architecture("llama", True),
    "mistral": _Architecture("llama", True),
    "phi3": _Architecture("phi3", False),
    "qwen2": _Architecture("qwen2", False),
    "qwen3": _Architecture("qwen3", False),
    "smollm3": _Architecture("smollm3", True),
}


def write_gguf_lora(
    adapter: SavedAdapter,
    file: Path,
    config: PreTrainedConfig,
    kinds: Mapping[str, LayerKind],
    rank: int | None = None,
    dtype: Dtype = "float32",
    progress: Progress | None = None,
) -> int:
    """Write a LoRA adapter that llama.cpp applies to the base's GGUF, with one layer in memory at a time.

    Args:
        adapter: The adapter.
        file: The GGUF to be; it appears when it is complete.
        config: The base's configuration.
        kinds: How each layer stores its weight, from `recorded_base.fit`.
        rank: K for the best approximation of rank K; None for the exact adapter, of rank r1 r2.
        dtype: Of A and B in the file.
        progress: Called with layers done and layers in all.

    Returns:
        The rank of every layer.

    Raises:
        ModelError: As in `check_gguf_lora`, the rank is not positive, or A or B has values that `dtype` cannot hold.
        RunError: The file cannot be written.
    """
    gguf, names = check_gguf_lora(adapter, config, kinds)
    layers = lora_layers(adapter, rank)
    chosen = exact_rank(adapter) if rank is None else rank
    partial = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(partial, _ARCHITECTURES[config.model_type].name)
    try:
        with disk_errors(file):
            _describe(gguf, writer, file.stem, chosen, dtype)
            for saved in adapter.layers.values():
                _announce(gguf, writer, f"{names[saved.name]}.lora_a", (chosen, saved.n), dtype)
                _announce(gguf, writer, f"{names[saved.name]}.lora_b", (saved.m, chosen), dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (expected, layer) in enumerate(zip(adapter.layers, layers, strict=True)):
                assert layer.name == expected, "the tensors must follow in the order announced"
                if progress:
                    progress(done, len(names))
                writer.write_tensor_data(_stored(gguf, layer, layer.A, dtype))
                writer.write_tensor_data(_stored(gguf, layer, _ordered(layer.B, layer.name, config), dtype))
            writer.close()
            os.replace(partial, file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    if progress:
        progress(len(names), len(names))
    return chosen


def check_gguf_lora(
    adapter: SavedAdapter, config: PreTrainedConfig, kinds: Mapping[str, LayerKind]
) -> tuple[ModuleType, Mapping[str, str]]:
    """Make sure that llama.cpp can hold an adapter, before any work is done.

    Args:
        adapter: The adapter.
        config: The base's configuration.
        kinds: How each layer stores its weight, from `recorded_base.fit`.

    Returns:
        The package `gguf`, and the name of each layer's weight in GGUF.

    Raises:
        ModelError: The package is missing, or llama.cpp's LoRA has no place for the base's architecture, for one of the layers,
            or for parameters that were trained whole.
    """
    advice = "use `--format gguf`, which exports the merged model"
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"{adapter.path}: its base is of type {config.model_type}, which is not exported as a llama.cpp LoRA (known: "
            f"{', '.join(_ARCHITECTURES)}); {advice}"
        )
    if adapter.whole:
        raise ModelError(
            f"{adapter.path}: {next(iter(adapter.whole))} was trained whole (modules_to_save or bias), which a llama.cpp LoRA "
            f"cannot hold; {advice}"
        )
    strange = next((name for name in adapter.layers if kinds[name] != "linear"), None)
    if strange:
        raise ModelError(
            f"{adapter.path}: {strange} is a {kinds[strange]} layer, and a llama.cpp LoRA is for linear ones; {advice}"
        )
    gguf = _package()
    known = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name), config.num_hidden_layers
    )
    names = {}
    for layer in adapter.layers:
        # llama.cpp reads the output layer of such models from the embedding, and refuses an adapter for it.
        tied = layer == "lm_head" and (config.tie_word_embeddings or architecture.name.startswith("gemma"))
        name = None if tied else known.get_name(layer)
        if name is None:
            raise ModelError(f"{adapter.path}: llama.cpp has no weight of its own for {layer} in {architecture.name}; {advice}")
        names[layer] = f"{name}.weight"
    return gguf, names


def _package() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModelError("writing GGUF needs the package gguf; pip install 'abba-cli[gguf]'") from None
    assert isinstance(gguf, ModuleType)
    return gguf


def _describe(gguf: ModuleType, writer: Any, name: str, rank: int, dtype: Dtype) -> None:
    """Write the keys that llama.cpp looks for; its scale is alpha / r, which is 1 here."""
    types = gguf.LlamaFileType
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_file_type({"float32": types.ALL_F32, "float16": types.MOSTLY_F16, "bfloat16": types.MOSTLY_BF16}[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _ordered(B: torch.Tensor, layer: str, config: PreTrainedConfig) -> torch.Tensor:
    """Bring the rows of B (m, r) into llama.cpp's order: of the two halves of a head's rows, one from each in turn.

    As LlamaModel.permute in https://github.com/ggml-org/llama.cpp/blob/7bca1fd9ca2a681b0182e16f24f832b7be1942af/conversion/llama.py.
    """
    if not _ARCHITECTURES[config.model_type].permuted or not layer.endswith(("q_proj", "k_proj")):
        return B
    heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
    m, r = B.shape
    return B.reshape(heads, 2, m // heads // 2, r).swapaxes(1, 2).reshape(m, r)


def _announce(gguf: ModuleType, writer: Any, name: str, shape: tuple[int, int], dtype: Dtype) -> None:
    import numpy

    # numpy has no bfloat16: it travels as bytes, twice as many as a row has numbers.
    raw = gguf.GGMLQuantizationType.BF16 if dtype == "bfloat16" else None
    kind = numpy.dtype("uint8" if raw is not None else dtype)
    stored = (shape[0], shape[1] * 2) if raw is not None else shape
    writer.add_tensor_info(name, stored, kind, stored[0] * stored[1] * kind.itemsize, raw_dtype=raw)


def _stored(gguf: ModuleType, layer: LoraLayer, factor: torch.Tensor, dtype: Dtype) -> Any:
    """The factor as numpy in the file's dtype."""
    rounded = factor.to(getattr(torch, dtype)).contiguous()
    if not rounded.isfinite().all():
        raise ModelError(
            f"{layer.name}: its LoRA factors reach {float(factor.abs().max()):.3g}, too large for {dtype}; use float32"
        )
    return rounded.view(torch.uint8).numpy() if dtype == "bfloat16" else rounded.numpy()
