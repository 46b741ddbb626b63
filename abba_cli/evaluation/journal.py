"""samples.jsonl: every answer as it comes, so that a stopped evaluation goes on and the same question is asked once."""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abba_cli.disk import append_jsonl, disk_errors, write_atomically
from abba_cli.errors import RunError
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Request

SAMPLES_FILE = "samples.jsonl"


def answer_key(fingerprint: str, request: Request, ends: Sequence[int], decoding: Decoding, sample: int, backend: str) -> str:
    """Digest of all that an answer depends on: the weights, the prompt's tokens, what ends it, and how tokens are chosen."""
    settings = [decoding.temperature, decoding.top_p, decoding.top_k, decoding.seed, sample] if decoding.temperature else []
    parts = [fingerprint, request.ids, request.stop, request.max_tokens, list(ends), settings, backend]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


class Journal:
    """The answers in an output folder.

    Args:
        folder: The output folder.
        rank: Of this process; each appends to a file of its own.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._own = folder / (SAMPLES_FILE if rank == 0 else f"samples.rank{rank}.jsonl")

    def read(self) -> dict[str, dict[str, Any]]:
        """All answers by their key; a line that a kill has cut short is left out."""
        found = {}
        for file in self._files():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    found[record["key"]] = record
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def add(self, record: Mapping[str, Any]) -> None:
        """Append an answer."""
        with disk_errors(self.folder):
            append_jsonl(self._own, record)

    def rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace everything by these records, in one file."""
        with disk_errors(self.folder):
            write_atomically(self.folder / SAMPLES_FILE, "".join(json.dumps(record) + "\n" for record in records))
            for file in self._files()[1:]:
                file.unlink()

    def clear(self) -> None:
        """Forget all answers."""
        with disk_errors(self.folder):
            for file in self._files():
                file.unlink()

    def _files(self) -> list[Path]:
        return [file for file in (self.folder / SAMPLES_FILE, *sorted(self.folder.glob("samples.rank*.jsonl"))) if file.is_file()]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create an output folder and keep other evaluations out of it.

    Raises:
        RunError: Another process writes there, or the folder cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("a")
    try:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another evaluation is writing to {folder}; wait for it, or choose another --output") from None
        yield
    finally:
        stream.close()
