"""A checkpoint's folder: sealed with the checksums of its files, found whole or not, and taken away."""

import hashlib
import json
import shutil
from pathlib import Path

from abba_cli.disk import sync, write_atomically
from abba_cli.folders import leads_out

_MANIFEST = "manifest.json"


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the manifest, last of all: a checkpoint without it, or with other files than it lists, does not count.

    Files and folders are on the disk before the manifest gets its name, so that a power cut cannot leave the promise alone.
    """
    inside = sorted(checkpoint.rglob("*"))
    files = [path for path in inside if path.is_file() and path.name != _MANIFEST]
    folders = [path for path in inside if path.is_dir()]
    for path in (*files, *folders, checkpoint, checkpoint.parent, checkpoint.parent.parent):
        sync(path)
    manifest = {str(path.relative_to(checkpoint)): _digest(path) for path in files}
    write_atomically(checkpoint / _MANIFEST, json.dumps(manifest, indent=1))


def is_sealed(checkpoint: Path) -> bool:
    """Whether the checkpoint was finished once, whatever became of its files."""
    return (checkpoint / _MANIFEST).exists()


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the manifest lists is there, unchanged."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        if any(leads_out(checkpoint / name, checkpoint) for name in manifest):  # who writes such a name might name /dev/zero
            return False
        return bool(manifest) and all(_digest(checkpoint / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, its manifest first: one that was half removed is not taken for a damaged one."""
    (checkpoint / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
