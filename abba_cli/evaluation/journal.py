"""samples.jsonl: every answer as it comes, so that a stopped evaluation goes on and the same question is asked once."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from abba_cli.disk import append_jsonl, disk_errors, write_atomically
from abba_cli.errors import DataError, RunError
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Request
from abba_cli.evaluation.results import RESULTS_FILE, read_results

SAMPLES_FILE = "samples.jsonl"
HARNESS_FOLDER = "harness"
_LOCK = ".lock"


def answer_key(
    fingerprint: str, task: str, row: int, request: Request, ends: Sequence[int], decoding: Decoding, sample: int, backend: str
) -> str:
    """Digest of whose answer it is and of all that it depends on.

    The weights, the prompt's tokens, what ends it, and how tokens are chosen; and the task and row, since two rows may ask the
    same and have other right answers.
    """
    settings = [decoding.temperature, decoding.top_p, decoding.top_k, decoding.seed, sample] if decoding.temperature else []
    parts = [fingerprint, task, row, request.ids, request.stop, request.max_tokens, list(ends), settings, backend]
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
        self._mended = False

    def read(self) -> dict[str, dict[str, Any]]:
        """All answers by their key; a line that a kill has cut short, or that is damaged, is left out."""
        found = {}
        for file in self._files():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if _is_record(record):
                    found[record["key"]] = record
        return found

    def add(self, record: Mapping[str, Any]) -> None:
        """Append an answer."""
        with disk_errors(self.folder):
            if not self._mended:
                self._end_last_line()
            append_jsonl(self._own, record)

    def _end_last_line(self) -> None:
        """A kill may have cut the last line short: what follows must not become a part of it."""
        self._mended = True
        if self._own.is_file() and self._own.read_bytes()[-1:] not in (b"", b"\n"):
            with self._own.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace everything by these records, in one file."""
        with disk_errors(self.folder):
            write_atomically(self.folder / SAMPLES_FILE, "".join(json.dumps(record) + "\n" for record in records))
            for file in self._files()[1:]:
                file.unlink()

    def clear(self) -> None:
        """Forget all answers, the harness's as well."""
        with disk_errors(self.folder):
            for file in (*self._files(), *(self.folder / HARNESS_FOLDER).glob("harness-*.jsonl")):
                file.unlink()

    def _files(self) -> list[Path]:
        return [file for file in (self.folder / SAMPLES_FILE, *sorted(self.folder.glob("samples.rank*.jsonl"))) if file.is_file()]


def _is_record(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    texts = ("key", "model", "fingerprint", "task", "prompt", "response", "gold", "graded")
    right = all(isinstance(record.get(name), str) for name in texts) and isinstance(record.get("score"), float)
    return right and {"prediction", "marked", "other_grader"} <= record.keys()


def check_folder(folder: Path) -> None:
    """Make sure that a folder may take results, before a model is loaded.

    Raises:
        RunError: It is a file, holds a results.json or samples.jsonl that is not ours, or another evaluation writes there.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output {folder} is a file; expected a folder, or a name that is free")
    nearest = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write to {nearest}; choose another --output")
    if (folder / _LOCK).is_file():
        with disk_errors(folder):
            stream = (folder / _LOCK).open("a")
        with stream:
            _take(stream, folder)
    results, samples = folder / RESULTS_FILE, folder / SAMPLES_FILE
    if results.is_file():
        try:
            read_results(results)
        except DataError as error:
            raise RunError(f"{error}; it is not replaced: choose another --output, or move it away") from None
    if samples.is_file() and samples.read_bytes().strip() and not Journal(folder).read():
        raise RunError(f"{samples} was not written by `abba eval`, so it is not touched; choose another --output")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create an output folder and keep other evaluations out of it.

    Raises:
        RunError: Another process writes there, or the folder cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / _LOCK).open("a")
    with stream:
        _take(stream, folder)
        yield


def _take(stream: IO[str], folder: Path) -> None:
    """Lock a folder until the stream is closed."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(f"another evaluation is writing to {folder}; wait for it, or choose another --output") from None
