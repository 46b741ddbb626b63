"""Writing to disk: whole files or none, by one process at a time, and one clear error where there is no room or permission."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from abba_cli.errors import RunError


def append_jsonl(file: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some file systems cannot, for a folder
            raise
    finally:
        os.close(descriptor)


def settle(folder: Path) -> None:
    """Bring all files of a folder, and their names, to the disk; not those of its subfolders."""
    for file in (path for path in folder.iterdir() if path.is_file()):
        sync(file)
    sync(folder)


def take_lock(file: Path) -> IO[str] | None:
    """Lock a file, which is made where there is none, until it is closed or the process ends.

    Returns:
        The open file, which its holder may remove before closing it; None while another has the lock.
    """
    while True:
        stream = file.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        except BlockingIOError:
            stream.close()
            return None
        except FileNotFoundError:
            pass
        # Its holder has removed the file after it was opened here: this is a lock on nothing, and another may have the next one.
        stream.close()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one clear error.

    Raises:
        RunError: In place of an OSError, or of the library's own error when the disk has no room left.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = _room(path) if full else "; choose another output, or mend it and run the same command again"
        raise RunError(f"cannot write to {path}: {error.strerror or error}{advice}") from error
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
