"""An ABBA adapter as a standard LoRA adapter of PEFT: exact at rank r1 r2, or the best approximation of a smaller rank.

Shapes: an adapted layer's frozen weight W0 is (m, n), also where it is stored as (n, m); R = r1 r2; r is the rank of the LoRA.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors import safe_open

from abba_cli.adapter import Factors, khatri_rao
from abba_cli.checkpoint import Planned, planned, write_header, write_tensor
from abba_cli.errors import ModelError
from abba_cli.recorded_base import LayerKind
from abba_cli.rundir import ADAPTER_FILES
from abba_cli.saved_adapter import SavedAdapter, SavedLayer

Dtype = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[int, int], None]

# MaxLoRARanks in vllm/config/lora.py, https://docs.vllm.ai/en/stable/api/vllm/config/lora/
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_BIAS: dict[str, Literal["none", "all", "lora_only"]] = {
    "none": "none",
    "all": "all",
    "abba_only": "lora_only",
    "lora_only": "lora_only",
}


@dataclass(frozen=True)
class LoraLayer:
    """One layer of a LoRA: dW is B A, with nothing to multiply it by.

    Args:
        name: The module's name in the base model.
        A: (r, n), float32.
        B: (m, r), float32; ABBA's scale s is baked in.
        error: |dW - B A| / |dW| in the Frobenius norm, from the singular values left out; 0.0 where the factors are exact.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    error: float


@dataclass(frozen=True)
class LoraReport:
    """What `write_lora` has written.

    Args:
        rank: Of every layer.
        errors: Relative Frobenius error of each layer, before rounding to the file's dtype.
        error: sqrt(sum |dW - B A|^2 / sum |dW|^2) over all layers.
        vllm_max_lora_rank: The smallest `--max-lora-rank` with which vLLM serves it; None where the rank is past vLLM's largest.
    """

    rank: int
    errors: Mapping[str, float]
    error: float
    vllm_max_lora_rank: int | None


def write_lora(
    adapter: SavedAdapter,
    folder: Path,
    kinds: Mapping[str, LayerKind],
    rank: int | None = None,
    dtype: Dtype = "float32",
    progress: Progress | None = None,
) -> LoraReport:
    """Write a LoRA adapter that stock PEFT loads, with one layer in memory at a time.

    Every layer gets the same rank, since servers read no patterns. Parameters that were trained whole are carried through in
    their own dtype.

    Args:
        adapter: The adapter.
        folder: A directory.
        kinds: How each layer stores its weight, from `recorded_base.fit`.
        rank: K for the best approximation of rank K; None for the exact adapter, of rank r1 r2.
        dtype: Of A and B in the file.
        progress: Called with layers done and layers in all.

    Raises:
        ModelError: A layer is a convolution, linear and transposed layers are mixed, the rank is not positive, or A or B has
            values that `dtype` cannot hold.
    """
    transposed = _transposed(adapter, kinds)
    chosen = _check_rank(adapter, rank)
    bias = _BIAS[getattr(adapter.config, "bias", "none")]
    config = LoraConfig(r=chosen, lora_alpha=chosen, bias=bias, fan_in_fan_out=transposed, **common_settings(adapter))
    config.save_pretrained(str(folder))
    before, factors, after = _layout(adapter, chosen, getattr(torch, dtype))
    errors: dict[str, float] = {}
    lost, whole = 0.0, 0.0
    with safe_open(adapter.path / ADAPTER_FILES[1], "pt") as source, (folder / ADAPTER_FILES[1]).open("wb") as stream:
        write_header(stream, [*before, *factors, *after], {"format": "pt"})
        for tensor in before:
            write_tensor(stream, source.get_tensor(tensor.name))
        for done, (layer, layer_lost, layer_whole) in enumerate(_converted(adapter, rank)):
            if progress:
                progress(done, len(adapter.layers))
            errors[layer.name] = layer.error
            lost, whole = lost + layer_lost, whole + layer_whole
            write_tensor(stream, rounded(layer.name, layer.A, dtype))
            write_tensor(stream, rounded(layer.name, layer.B, dtype))
        for tensor in after:
            write_tensor(stream, source.get_tensor(tensor.name))
    if progress:
        progress(len(adapter.layers), len(adapter.layers))
    error = math.sqrt(lost / whole) if lost else 0.0
    return LoraReport(chosen, errors, error, next((one for one in _VLLM_RANKS if one >= chosen), None))


def exact_rank(adapter: SavedAdapter) -> int:
    """The rank at which a LoRA is the adapter exactly: the largest r1 r2."""
    return max(layer.r1 * layer.r2 for layer in adapter.layers.values())


def lora_layers(adapter: SavedAdapter, rank: int | None = None) -> Iterator[LoraLayer]:
    """The adapter's layers as LoRA factors, all of one rank.

    Args:
        adapter: The adapter.
        rank: None for the exact factors B_kr and A_kr, padded with zeros to `exact_rank`. K for the best approximation of rank K
            (Eckart and Young); a layer whose r1 r2 is not above K stays exact.

    Raises:
        ModelError: The rank is not positive.
    """
    _check_rank(adapter, rank)
    return (layer for layer, _, _ in _converted(adapter, rank))


def _converted(adapter: SavedAdapter, rank: int | None) -> Iterator[tuple[LoraLayer, float, float]]:
    """The layers, each with |dW - B A|^2 and |dW|^2 (0 and 0 where no rank was asked for: nothing is lost then)."""
    padded = exact_rank(adapter) if rank is None else rank
    for layer in adapter.layers.values():
        # In float64, so that each product is rounded once, at the end.
        B, A = khatri_rao(Factors(*(one.double() for one in adapter.factors(layer.name))))
        B *= layer.s
        lost, whole = 0.0, 0.0
        if rank is not None and layer.r1 * layer.r2 > rank:
            B, A, lost, whole = _truncated(B, A, rank)
        elif rank is not None:
            whole = max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))
        missing = padded - A.shape[0]
        A, B = torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
        yield LoraLayer(layer.name, A.float(), B.float(), math.sqrt(lost / whole) if lost else 0.0), lost, whole


def _truncated(B: torch.Tensor, A: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best approximation of B A of a given rank; each factor gets the square roots of the singular values.

    B = Q_B R_B and A^T = Q_A R_A reduce the SVD of the (m, n) product to that of R_B R_A^T, which is at most (R, R).

    Args:
        B: (m, R).
        A: (R, n).
        rank: The rank; fewer singular values than that, min(m, n, R), give smaller factors and lose nothing.

    Returns:
        (m, rank), (rank, n), and the squared Frobenius norms of what is lost and of B A.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    squares = S.square()
    return Q_B @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ Q_A.T, float(squares[rank:].sum()), float(squares.sum())


def _check_rank(adapter: SavedAdapter, rank: int | None) -> int:
    if rank is not None and rank < 1:
        raise ModelError(
            f"a LoRA of rank {rank} was asked for; expected 1 or more (the exact one has rank {exact_rank(adapter)})"
        )
    return exact_rank(adapter) if rank is None else rank


def _transposed(adapter: SavedAdapter, kinds: Mapping[str, LayerKind]) -> bool:
    """Whether the base stores its weights as (n, m), which LoRA's configuration says once for all layers."""
    first: dict[LayerKind, str] = {}
    for name, kind in kinds.items():
        first.setdefault(kind, name)
    if "convolution" in first:
        raise ModelError(
            f"{adapter.path}: {first['convolution']} is a convolution, which is not exported as LoRA; `abba merge` writes the "
            "whole model"
        )
    if len(first) > 1:
        raise ModelError(
            f"{adapter.path}: {first['linear']} is a linear layer and {first['transposed']} a transposed one (Conv1D), which one "
            "LoRA configuration cannot say (fan_in_fan_out); `abba merge` writes the whole model"
        )
    return "transposed" in first


def common_settings(adapter: SavedAdapter) -> dict[str, Any]:
    """The fields that every PEFT configuration has: which modules are adapted or saved whole, and the base.

    A default that PEFT looks up by architecture, or a shorthand, becomes the layers' own names: not every reader knows those.
    """
    given = adapter.config
    named = given.target_modules is None or given.target_modules == "all-linear"
    return {
        "target_modules": sorted(adapter.layers) if named else given.target_modules,
        "exclude_modules": None if named else given.exclude_modules,
        "layers_to_transform": None if named else given.layers_to_transform,
        "layers_pattern": None if named else given.layers_pattern,
        "modules_to_save": given.modules_to_save,
        "task_type": given.task_type,
        "base_model_name_or_path": given.base_model_name_or_path,
        "revision": given.revision,
        "inference_mode": True,
    }


def rounded(layer: str, factor: torch.Tensor, dtype: Dtype) -> torch.Tensor:
    """A layer's factor in the dtype of the file.

    Raises:
        ModelError: It has values that the dtype cannot hold.
    """
    result = factor.to(getattr(torch, dtype))
    if not result.isfinite().all():
        other = "bfloat16" if dtype == "float16" else "float32"
        raise ModelError(f"{layer}: its factors reach {float(factor.abs().max()):.3g}, too large for {dtype}; use {other}")
    return result


def _layout(adapter: SavedAdapter, rank: int, dtype: torch.dtype) -> tuple[list[Planned], list[Planned], list[Planned]]:
    """The file's tensors: some of those trained whole, A and B of every layer, the rest of those trained whole.

    Wider dtypes come first, so that every tensor is aligned to its own width.
    """
    factors = [one for layer in adapter.layers.values() for one in _planned(layer, rank, dtype)]
    before: list[tuple[int, Planned]] = []
    after: list[tuple[int, Planned]] = []
    with safe_open(adapter.path / ADAPTER_FILES[1], "pt") as file:
        for key in adapter.whole.values():
            tensor = file.get_tensor(key)
            slot = Planned(key, file.get_slice(key).get_dtype(), tuple(tensor.shape), tensor.nbytes)
            (before if tensor.itemsize > dtype.itemsize else after).append((tensor.itemsize, slot))
    wide, narrow = ([slot for _, slot in sorted(part, key=lambda sized: -sized[0])] for part in (before, after))
    return wide, factors, narrow


def _planned(layer: SavedLayer, rank: int, dtype: torch.dtype) -> Iterator[Planned]:
    yield planned(f"base_model.model.{layer.name}.lora_A.weight", dtype, (rank, layer.n))
    yield planned(f"base_model.model.{layer.name}.lora_B.weight", dtype, (layer.m, rank))
