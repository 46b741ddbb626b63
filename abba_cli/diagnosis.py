"""`abba doctor`: what this machine and its packages can do for a run, and what to install for what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Literal

import psutil
import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from abba_cli import __version__

State = Literal["ok", "absent", "broken"]

_PURPOSES = {
    "gguf": "GGUF bases, GGUF exports",
    "harness": "abba eval --protocol harness",
    "vllm": "abba eval --backend vllm",
    "deepspeed": "distributed.strategy: deepspeed",
    "tensorboard": "logging.logger: tensorboard",
    "wandb": "logging.logger: wandb",
    "trackio": "logging.logger: trackio",
}
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: The heading that it belongs under.
        name: What was looked at.
        state: ok; absent, which limits what can be done; or broken, with which abba does not work.
        found: What there is.
        advice: What to do, where something is.
    """

    topic: str
    name: str
    state: State
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at packages, devices, disks and the hub's settings; reaches no network."""
    return [*_packages(), *_optional(), *_devices(), *_kernels(), *_disks(), *_hub()]


def _requirements() -> list[Requirement]:
    found = [Requirement(text) for text in importlib.metadata.requires("abba-cli") or []]
    return [one for one in found if one.marker is None or "extra" in str(one.marker) or one.marker.evaluate()]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    yield Finding("packages", "abba", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for requirement in _requirements():
        if "extra" in str(requirement.marker):
            continue
        version = _installed(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        wanted = f"{requirement.name}{requirement.specifier}"
        yield Finding(
            "packages",
            requirement.name,
            "ok" if fits else "broken",
            (version or "not installed") if fits or version is None else f"{version}, expected {requirement.specifier}",
            "" if fits else f"pip install '{wanted}'",
        )


def _optional() -> Iterator[Finding]:
    for extra, purpose in _PURPOSES.items():
        names = [one.name for one in _requirements() if re.search(rf"extra == ['\"]{extra}['\"]", str(one.marker))]
        versions = [_installed(name) for name in names]
        there = bool(versions) and all(versions)
        found = ", ".join(f"{name} {version}" for name, version in zip(names, versions, strict=True) if version)
        advice = "" if there else f"for {purpose}: pip install 'abba-cli[{extra}]'"
        yield Finding("optional", extra, "ok" if there else "absent", found or "not installed", advice)


def _devices() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_gb(memory.available)} of {_gb(memory.total)} free"
    yield Finding("devices", "CPU", "ok", f"{cpu}, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        bf16 = (major, minor) >= _AMPERE
        found = f"{torch.cuda.get_device_name(index)}, compute {major}.{minor}, {_gb(free)} of {_gb(total)} free"
        advice = "" if bf16 else "bfloat16 is emulated before compute 8.0: set model.dtype to float16"
        yield Finding("devices", f"GPU {index}", "ok" if bf16 else "absent", found, advice)
    if not torch.cuda.is_available():
        build = (
            "a CPU build of torch" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda}, which finds no card"
        )
        advice = "with an NVIDIA card: a CUDA build of torch and its driver (nvidia-smi shows the card)"
        yield Finding("devices", "GPU", "absent", build, advice)


def _kernels() -> Iterator[Finding]:
    cards = torch.cuda.is_available()
    triton = _installed("triton")
    yield Finding(
        "kernels",
        "Triton",
        "ok" if triton else "absent",
        f"{triton}, for cards of compute 8.0 and later" if triton else "not installed",
        "" if triton or not cards else "pip install triton; without it the same is computed by PyTorch, more slowly",
    )
    flash = _installed("flash-attn")
    other = f", flash-attn {flash} for model.attention: flash_attention_2" if flash else ""
    yield Finding("kernels", "attention", "ok", f"PyTorch's SDPA{other}")
    yield _bitsandbytes()


def _bitsandbytes() -> Finding:
    if importlib.util.find_spec("bitsandbytes") is None:
        advice = "for model.quantization and adamw_8bit: pip install bitsandbytes"
        return Finding("kernels", "bitsandbytes", "absent", "not installed", advice)
    try:
        import bitsandbytes

        device = "cuda" if torch.cuda.is_available() else "cpu"
        packed, state = bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        bitsandbytes.functional.dequantize_4bit(packed, state)
    except Exception as error:  # whatever its native library raises is what there is to report
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("kernels", "bitsandbytes", "absent", f"does not work: {first}", "pip install --upgrade bitsandbytes")
    return Finding("kernels", "bitsandbytes", "ok", f"quantises to nf4 on the {'GPU' if device == 'cuda' else 'CPU'}")


def _disks() -> Iterator[Finding]:
    for name, folder in (("here", Path.cwd()), ("hub cache", Path(constants.HF_HUB_CACHE)), ("data cache", _data_cache())):
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        writable = os.access(existing, os.W_OK)
        found = f"{folder}, {_gb(shutil.disk_usage(existing).free)} free"
        advice = "" if writable else "cannot be written: set HF_HOME to a folder that can"
        yield Finding("disks", name, "ok" if writable else "absent", found, advice)


def _data_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def _hub() -> Iterator[Finding]:
    there = get_token() is not None
    advice = "" if there else "for gated models and abba push: hf auth login"
    yield Finding("hub", "login", "ok" if there else "absent", "yes" if there else "no", advice)
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "access", "absent", "off", "HF_HUB_OFFLINE is set: only what is in the cache can be used")
    else:
        yield Finding("hub", "access", "ok", constants.ENDPOINT)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
