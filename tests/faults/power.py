"""A power cut: what a run has synced is all that is left of it."""

import os
import stat
from pathlib import Path

from breaking import at_operation, at_step, die


class Disk:
    """What a file system owes: of a synced file its content at that time, of a synced folder its names.

    Args:
        output: The run directory; what lies outside is not looked at.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._names: dict[int, dict[str, int]] = {}
        self._contents: dict[int, bytes] = {}
        self._held: list[int] = []
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            self._note(descriptor)

        os.fsync = noted

    def _note(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path != self.output.parent and not path.is_relative_to(self.output):
            return
        self._held.append(os.dup(descriptor))  # so that no later file gets its inode
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = {one.name: one.inode() for one in os.scandir(path)}
        else:
            self._contents[status.st_ino] = path.read_bytes()

    def cut(self, left: Path) -> None:
        """Write to `left` what is there when the power comes back, and die."""
        self._copy(self._names[self.output.parent.stat().st_ino][self.output.name], left)
        die()

    def _copy(self, folder: int, left: Path) -> None:
        """A name without synced content is an empty file; a folder that was not synced is empty."""
        left.mkdir()
        for name, inode in self._names.get(folder, {}).items():
            if inode in self._names:
                self._copy(inode, left / name)
            else:
                (left / name).write_bytes(self._contents.get(inode, b""))


def cut_at_step(output: Path, left: Path, step: int) -> None:
    """Have the power fail at the end of a step."""
    disk = Disk(output)
    at_step(step, lambda: disk.cut(left))


def cut_before(output: Path, left: Path, operation: str) -> None:
    """Have the power fail before the file operation whose name ends so."""
    disk = Disk(output)

    def look(name: str) -> None:
        if name.endswith(operation):
            disk.cut(left)

    at_operation(output, look)
