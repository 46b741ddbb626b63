"""One row, in a process of its own: the methods take turns, and then each one's memory is measured."""

import gc
import os
import platform
import random
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abba_cli import __version__
from abba_cli.memory import available_memory, reuse_freed_memory

from .grids import SHAPES, Row, Shape
from .memory import kept_bytes, peak_bytes
from .methods import DTYPES, UNDER_AUTOCAST, NotHere, adapted, base_model


@dataclass(frozen=True)
class Settings:
    """What holds for all rows of a run.

    Args:
        device: "cpu" or "cuda".
        rounds: Timed steps of each method, after one that is not timed.
        optimizer: Whether a step includes fused AdamW.
        reference: A checkout of the authors' code.
    """

    device: str
    rounds: int
    optimizer: bool
    reference: Path | None


@dataclass(frozen=True)
class Candidate:
    """A method's model, and how it is run."""

    model: nn.Module
    autocast: bool
    optimizer: torch.optim.Optimizer | None


def measure(row: Row, settings: Settings) -> dict[str, Any]:
    """Returns what was measured, ready for JSON: seconds of each round, bytes, and why a method was left out.

    A method that runs out of a GPU's memory is left out and the others go on. On a CPU the system ends the process.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    reuse_freed_memory()  # as `abba train` does; for all methods alike
    device, shape = torch.device(settings.device), SHAPES[row.shape]
    torch.manual_seed(0)
    layers = layers_that_fit(row, shape, available_memory(device))
    base = base_model(row, shape, layers, device)
    ids = torch.randint(0, base.config.vocab_size, (row.batch, row.length), device=device)
    candidates: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}
    for name in row.methods:
        try:
            model = adapted(name, base, row, shape, settings.reference)
            candidates[name] = _candidate(name, model, row, settings)
            _step(candidates[name], ids)
        except NotHere as reason:
            left_out[name] = str(reason)
        except torch.OutOfMemoryError:
            candidates.pop(name, None)
            left_out[name] = "out of memory"
        gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(settings.rounds):
        order = list(candidates)
        random.Random(turn).shuffle(order)
        for name in order:
            seconds[name].append(_timed_step(candidates[name], ids))
    return {
        "row": asdict(row),
        "settings": {"device": settings.device, "rounds": settings.rounds, "optimizer": settings.optimizer},
        "layers": layers,
        "methods": {name: {"seconds": seconds[name], **_memory(candidates[name], ids)} for name in candidates},
        "left_out": left_out,
        "environment": environment(device),
    }


def layers_that_fit(row: Row, shape: Shape, free: int) -> int:
    """Returns how many layers leave the methods enough memory, by a rough upper estimate of what a step needs.

    Args:
        row: Says how many layers are wanted.
        shape: Sizes.
        free: Bytes.
    """
    size = DTYPES[row.precision].itemsize
    vocabulary = shape.vocabulary if row.whole else 0
    # The logits, their float32 copy, its log-softmax and the gradient; the table of embeddings, once or twice.
    head = vocabulary * (row.tokens * (size + 12) + 2 * shape.hidden * size)
    # What is kept for backward, the weight, and a delta or product of its shape in float32 that some methods keep.
    layer = row.tokens * (8 * shape.hidden + 4 * shape.intermediate) * size + shape.layer_parameters * (size + 6)
    return max(1, min(row.layers, int((0.85 * free - head) // layer)))


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that decide what was measured."""
    versions = {"abba": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _candidate(name: str, model: nn.Module, row: Row, settings: Settings) -> Candidate:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = None
    if settings.optimizer and trained:
        if name == "full":
            # The others share these weights.
            for parameter in trained:
                parameter.data = parameter.data.clone()
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    autocast = settings.device == "cuda" and row.precision != "fp32" and name in UNDER_AUTOCAST
    return Candidate(model, autocast, optimizer)


def _loss(candidate: Candidate, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=candidate.autocast):
        loss: torch.Tensor = candidate.model(input_ids=ids, labels=ids).loss
    return loss


def _step(candidate: Candidate, ids: torch.Tensor) -> None:
    _loss(candidate, ids).backward()  # type: ignore[no-untyped-call]
    if candidate.optimizer:
        candidate.optimizer.step()
    for parameter in candidate.model.parameters():
        parameter.grad = None


def _timed_step(candidate: Candidate, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    _step(candidate, ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(candidate: Candidate, ids: torch.Tensor) -> dict[str, int | None]:
    """Trained parameters and bytes. The measures cost more than a plain step, and may be the first to run out of memory."""
    forward = partial(_loss, candidate, ids)
    trained = [parameter for parameter in candidate.model.parameters() if parameter.requires_grad]
    sizes: dict[str, int | None] = {
        "trained": sum(parameter.numel() for parameter in trained),
        "gradient_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "kept_bytes": None,
        "peak_bytes": None,
    }
    try:
        sizes["kept_bytes"] = kept_bytes(candidate.model, forward)
        sizes["peak_bytes"] = peak_bytes(candidate.model, forward, ids.device)
    except torch.OutOfMemoryError:
        gc.collect()
    return sizes
