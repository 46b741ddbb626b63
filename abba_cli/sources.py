"""What a recipe names as data -> rows in memory: hub sets, local files of every kind, files of installed packages."""

import csv
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import random
import re
import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import ReadInstruction
from datasets.exceptions import DatasetsError

from abba_cli.errors import DataError
from abba_cli.formats import Reader, reader_for
from abba_cli.recipe import SourceSection

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")

SPLIT_WORDS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
"""Words in the names of a directory's files, and the split they mean; other files are `train`."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class LoadedSource:
    """One source in memory: its numbered rows and how to read them."""

    section: SourceSection
    rows: list[tuple[int, dict[str, Any]]]
    found: int
    reader: Reader
    sha256: dict[str, str]


def load_source(source: SourceSection, seed: int) -> LoadedSource:
    """Read a source: rows after split and max_rows, repeated or sampled by weight."""
    found, sha256 = _read(source)
    if not found:
        raise DataError(f"{source.path} has no rows in split `{source.split}`")
    found = found[: source.max_rows]
    # Rows of a JSON file may leave columns out; data sets on the hub hold null there.
    columns = dict.fromkeys(column for row in found for column in row)
    rows = [row if row.keys() == columns.keys() else {**columns, **row} for row in found]
    copies, part = divmod(source.weight, 1.0)
    numbers = list(range(len(rows))) * int(copies)
    numbers += sorted(random.Random(seed).sample(range(len(rows)), round(part * len(rows))))
    if not numbers:
        raise DataError(f"weight {source.weight} leaves none of the {len(rows)} rows of {source.path}: raise it")
    try:
        reader = reader_for(list(columns), source.prompt, source.completion)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from error
    return LoadedSource(source, [(number, rows[number]) for number in numbers], len(rows), reader, sha256)


def _read(source: SourceSection) -> tuple[Rows, dict[str, str]]:
    """Return a source's rows of its split and the digests of its files."""
    path = _local_path(source.path)
    if path is None:
        return read_hub(source), {}
    wanted = source.split.partition("[")[0]
    files = _files(path)
    rows = {name: [row for file in group for row in read_file(file)] for name, group in files.items() if name == wanted}
    sizes = {name: len(rows.get(name, ())) for name in files}
    try:
        [part] = ReadInstruction.from_spec(source.split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source.path} has no split `{source.split}`: expected {' or '.join(sizes)}, with an optional slice such "
            "as train[:1000] or train[10%:]"
        ) from error
    return rows[wanted][part.from_ : part.to], _digests(files[wanted])


def digests(source: SourceSection) -> dict[str, str] | None:
    """SHA-256 of each file that a source would be read from, by path; None for the hub, or where one cannot be read.

    Raises:
        DataError: There is no such file.
    """
    path = _local_path(source.path)
    try:
        return None if path is None else _digests(_files(path).get(source.split.partition("[")[0], []))
    except OSError:
        return None


def _digests(files: list[Path]) -> dict[str, str]:
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _local_path(path: str) -> Path | None:
    """Return the local path that a source names, or None for a hub id."""
    if path.startswith("package:"):
        package, _, inner = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"{path}: no Python package `{package}` is installed here; install it with pip")
        return Path(spec.submodule_search_locations[0]) / inner
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.removesuffix(".gz").endswith(SUFFIXES)
    return local if looks_local or local.exists() else None


def _files(path: Path) -> dict[str, list[Path]]:
    """Return the data files of a path by split: a file is `train`, a directory's files may name theirs (test.jsonl)."""
    if not path.exists():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise DataError(f"{path} does not exist{hint}")
    if not path.is_dir():
        return {"train": [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if file.name.removesuffix(".gz").endswith(SUFFIXES):
            words = re.split(r"[^a-z]+", file.name.lower())
            found.setdefault(next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train"), []).append(file)
    if not found:
        raise DataError(f"the directory {path} holds no data file: expected {', '.join(SUFFIXES)}")
    return found


def read_file(path: Path) -> Rows:
    """Read one data file by its suffix; what is neither parquet, csv nor txt is taken for JSON."""
    try:
        if path.suffix == ".parquet":
            return list(parquet.read_table(path).to_pylist())
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".txt":
        return [{"text": line} for line in text.splitlines() if line.strip()]
    return _parse_csv(path, text) if suffix == ".csv" else _parse_json(path, text)


def _parse_csv(path: Path, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: Rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"expected {len(reader.fieldnames or ())} fields as in the first line")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
    return rows


def _parse_json(path: Path, text: str) -> Rows:
    """Parse a list of objects, or one object a line."""
    line = 1
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for line, content in enumerate(text.split("\n"), start=1):  # noqa: B007  (the error names the line)
                if content.strip():
                    rows.append(json.loads(content))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}: not valid JSON ({error.msg}): expected a list of objects, or one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{path}:{line}: not valid JSON ({error})") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {str(row)[:40]!r}, expected an object with named columns")
    return list(rows)


def read_hub(source: SourceSection) -> Rows:
    """Download a data set of the hub, quietly."""
    quiet = logging.getLogger("huggingface_hub")
    level, bars = quiet.level, datasets.are_progress_bars_disabled()
    quiet.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
        return list(loaded.to_list())
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _hub_error(source, error) from error
    finally:
        quiet.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _hub_error(source: SourceSection, error: Exception) -> DataError:
    page = f"https://huggingface.co/datasets/{source.path}"
    text = _first_line(error)
    status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
    if "gated" in text or status in (401, 403):
        return DataError(f"{source.path} is gated: ask for access at {page}, then log in with `hf auth login`")
    if isinstance(error, ConnectionError):
        return DataError(f"{source.path} is no local file, and the hub cannot be reached to look for it there: {text}")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{source.path} is neither a local file nor a data set of the hub that you can see ({page}): {text}")
    return DataError(f"{source.path} (subset {source.subset}, split {source.split}) cannot be loaded: {text}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
