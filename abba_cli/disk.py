"""Writing to disk: whole files or none, and one clear error when there is no room or no permission."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abba_cli.errors import RunError


def append_jsonl(file: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one clear error.

    Raises:
        RunError: In place of an OSError, or of the library's own error when the disk has no room left.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}{_room(path)}") from error
    except Exception as error:
        # safetensors and torch.save (PytorchStreamWriter, inline_container.cc) have errors of their own for a full disk.
        if any(words in str(error) for words in ("No space left", "PytorchStreamWriter", "inline_container")):
            raise RunError(f"cannot write to {path}: no space left on the disk{_room(path)}") from error
        raise


def _room(path: Path) -> str:
    return f" ({_free_bytes(path) / 1e6:,.0f} MB free); make room or choose another output, then run the same command again"


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
