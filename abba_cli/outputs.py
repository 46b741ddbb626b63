"""Directories that commands write whole or not at all, and never over something they did not make."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abba_cli import __version__
from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import RunError

_RECORD = "abba.json"


def check_output(output: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Make sure that a directory may be written and has room, before long work begins.

    Args:
        output: The directory to be.
        overwrite: Replace one that a command of ours has made.
        needed_bytes: What will be written.

    Raises:
        RunError: It exists, its disk has no room, or its parent cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise RunError(f"output {output} exists; choose another, or give --overwrite to replace it")
        if not (output / _RECORD).is_file():
            raise RunError(
                f"output {output} was not written by `abba merge` or `abba export`, so it is not replaced; choose another"
            )
    nearest = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write to {nearest}; choose another output")
    free = shutil.disk_usage(nearest).free
    if free < needed_bytes:
        raise RunError(
            f"output {output} needs {needed_bytes / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free; "
            "make room or choose another output"
        )


@contextmanager
def new_directory(output: Path, overwrite: bool, record: Mapping[str, Any]) -> Iterator[Path]:
    """Give a temporary directory beside `output`, and rename it into place when the block has ended well.

    Args:
        output: The directory to be.
        overwrite: As in `check_output`.
        record: What made it, written to abba.json with our version.

    Raises:
        RunError: As in `check_output`, or another process is writing the same output.
    """
    check_output(output, overwrite)
    partial = output.parent / f".{output.name}.partial"
    with disk_errors(output):
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is writing {output}; wait for it, or choose another output") from None
        try:
            with disk_errors(output):
                _empty(partial)  # what a killed process left
                yield partial
                write_atomically(partial / _RECORD, json.dumps({"abba": __version__, **record}, indent=2) + "\n")
                old = output.parent / f".{output.name}.old"
                shutil.rmtree(old, ignore_errors=True)
                if output.exists():
                    os.replace(output, old)
                os.replace(partial, output)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
