"""What a folder of others holds has to lie in it: names and links that lead out of it are refused."""

from pathlib import Path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path below a folder, with its links followed, ends outside of it.

    The hub's cache is one folder, whose snapshots hold links to its blobs.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    return not path.resolve().is_relative_to(root)
