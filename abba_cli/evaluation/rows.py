"""The rows of a task, from local files or the hub; a row that cannot be read is told of, never dropped in silence."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abba_cli.errors import DataError
from abba_cli.evaluation.tasks import SUFFIXES, Task
from abba_cli.formats import Row
from abba_cli.recipe import SourceSection
from abba_cli.sources import read_file, read_hub


@dataclass(frozen=True)
class TaskRows:
    """The rows of one split.

    Args:
        source: The file or hub data set, and the split.
        rows: Each with its place: `FILE:LINE`, or `FILE, row N`.
        unreadable: One line about each row that could not be read, with its place.
    """

    source: str
    rows: list[tuple[str, Row]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def read_rows(task: Task, split: str | None = None, data_dir: Path | None = None) -> TaskRows:
    """Read the rows of a task.

    Args:
        task: The task.
        split: In place of the task's own.
        data_dir: Folder of local data: DIR/NAME/SPLIT.json and the like; what is not there comes from the hub.

    Raises:
        DataError: They are neither in the folder nor to be had from the hub, or there are none.
    """
    data = task.data
    asked = split or data.split
    own = Path(data.path)
    if own.exists() or data.path.startswith("/"):
        file = own if own.is_file() else _first_file([own], [asked])
        if file is None:
            raise DataError(f"task {task.name}: {own} does not exist, or has no file for the split {asked}")
        return _in_file(task, file, None)
    # Files in LLM-Adapters' form are called test, whatever split of the source they came from.
    stems = [asked] if split else list(dict.fromkeys(["test", asked]))
    folders = _folders(task, data_dir) if data_dir else []
    if (file := _first_file(folders, stems)) is not None:
        return _in_file(task, file, None)
    if data.file is not None and (file := _first_file(folders, [data.file])) is not None:
        if data.ranges is not None and asked not in data.ranges:
            raise DataError(f"{task.name} has no split {asked}; expected one of {', '.join(data.ranges)}")
        return _in_file(task, file, data.ranges[asked] if data.ranges else None)
    subsets = data.subset if isinstance(data.subset, tuple) else (data.subset,)
    place = f"{data.folders[0] if data.folders else task.name}/{data.file or stems[0]}.jsonl"
    try:
        rows: list[dict[str, Any]] = []
        for subset in subsets:
            rows += read_hub(SourceSection(path=data.path, subset=subset, split=asked))
    except DataError as error:
        where = f"in {data_dir} there is no {place} (or .json, .parquet, .csv)" if data_dir else "no --data-dir was given"
        raise DataError(f"task {task.name}: {where}; {error}. Put the file at DIR/{place} and give --data-dir DIR") from None
    source = f"{data.path}, split {asked}"
    if not rows:
        raise DataError(f"task {task.name}: {source} has no rows")
    return TaskRows(source, [(f"{source}, row {number}", row) for number, row in enumerate(rows)])


def _folders(task: Task, data_dir: Path) -> list[Path]:
    names = dict.fromkeys((*task.data.folders, task.name, *task.aliases))
    above = [data_dir, *([data_dir / task.group] if task.group else [])]
    return [folder / name for folder in above for name in names]


def _first_file(folders: Sequence[Path], stems: Sequence[str]) -> Path | None:
    candidates = (folder / f"{stem}{suffix}" for folder in folders for stem in stems for suffix in SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def _in_file(task: Task, file: Path, part: tuple[int, int] | None) -> TaskRows:
    found = list(_lines(file)) if ".jsonl" in file.suffixes else list(_whole(file))
    if part is not None:
        found = found[part[0] : part[1]]
    if not found:
        raise DataError(f"task {task.name}: {file} has no rows")
    rows = [(place, row) for place, row in found if not isinstance(row, str)]
    return TaskRows(str(file), rows, [f"{place}: {row}" for place, row in found if isinstance(row, str)])


def _lines(file: Path) -> Iterator[tuple[str, Row | str]]:
    """Each line's place with its row, or with what is wrong with it."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{file}:{number}", f"not valid JSON ({error})"
            continue
        yield f"{file}:{number}", row if isinstance(row, dict) else f"{line.strip()[:40]!r} is no object with named columns"


def _whole(file: Path) -> Iterator[tuple[str, Row | str]]:
    for number, row in enumerate(read_file(file)):
        yield f"{file}, row {number}", row
