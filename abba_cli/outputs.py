"""Directories that commands write whole or not at all, and never over something they did not make."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abba_cli import __version__
from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import RunError

_RECORD = "abba.json"


def place(output: Path) -> Path:
    """Where an output that a user has named goes: `~` is the home directory, and a link leads to its target."""
    output = output.expanduser()
    return output.resolve() if output.is_symlink() else output


def check_output(
    output: Path, overwrite: bool, needed_bytes: int = 0, *, command: str | None = None, sources: Sequence[Path] = ()
) -> None:
    """Make sure that a directory may be written and has room, before long work begins.

    Args:
        output: The directory to be.
        overwrite: Replace one that the same command has made.
        needed_bytes: What will be written.
        command: The command; None leaves what an existing directory holds unchecked beyond being one of ours.
        sources: What is read: never replaced.

    Raises:
        RunError: It exists, holds a source, its disk has no room, or its parent cannot be written.
    """
    for source in sources:
        if output.resolve() in (source.resolve(), *source.resolve().parents):
            raise RunError(f"output {output} is or holds {source}, which is being read; choose another output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise RunError(f"output {output} exists; choose another, or give --overwrite to replace it")
        made = read_record(output).get("command", command)
        if command is not None and made != command:
            raise RunError(
                f"output {output} was written by `abba {made}`, so `abba {command}` does not replace it; choose another"
            )
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
def new_directory(output: Path, overwrite: bool, record: Mapping[str, Any], sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Give a temporary directory beside `output`, and rename it into place when the block has ended well.

    Args:
        output: The directory to be.
        overwrite: As in `check_output`.
        record: What made it (`command` is the command), written to abba.json with our version.
        sources: What is read: never replaced.

    Raises:
        RunError: As in `check_output`, or another process is writing the same output.
    """
    check_output(output, overwrite, command=record["command"], sources=sources)
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


def read_record(folder: Path) -> dict[str, Any]:
    """What a directory of ours says about how it was made; {} for any other."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def write_card(folder: Path, name: str, base: str | None, library: str, tags: Sequence[str], text: str) -> None:
    """Write README.md, the card that the hub shows.

    Args:
        folder: Where.
        name: The heading.
        base: Location of the base; named in the card's head if it is a hub id.
        library: The hub's `library_name`.
        tags: The hub's tags.
        text: What it is.
    """
    hub = base is not None and not Path(base).is_absolute()
    head = ["---", *([f"base_model: {base}"] if hub else []), f"library_name: {library}", f"tags: [{', '.join(tags)}]", "---"]
    write_atomically(folder / "README.md", "\n".join([*head, "", f"# {name}", "", text, ""]))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
