"""Data for the harness's tasks: local files in the columns of the source in place of hub sets, and who is to blame."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from lm_eval.api.task import ConfigurableTask

from abba_cli.errors import DataError
from abba_cli.evaluation.harness.tasks import KNOWN
from abba_cli.hub import reason_for
from abba_cli.sources import read_file

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
_FORM = {"instruction", "output"}
"""Columns of LLM-Adapters' files, which have the question and its choices as one finished text."""


@contextmanager
def served_data(task: str, data_dir: Path | None, shots: int | None) -> Iterator[dict[str, str]]:
    """While this lasts, tasks that the harness builds take their rows from local files where there are some.

    Args:
        task: What was asked for: one of our names, or one of the harness's.
        data_dir: Folder of local data, DIR/NAME/SPLIT.jsonl and the like.
        shots: Worked examples that are asked for; they need their split.

    Yields:
        Where the rows of each task came from, as tasks are built.

    Raises:
        DataError: Rows are neither in the folder nor to be had from the hub, or have the wrong columns.
    """
    came_from: dict[str, str] = {}
    # The harness fills a task through this method, whichever way the task was named: alone, in a group, by a tag or a file.
    original = ConfigurableTask.download

    def download(built: Any, dataset_kwargs: dict[str, Any] | None = None, **rest: Any) -> None:
        config = built.config
        if callable(config.custom_dataset) or str(config.dataset_path) in _BUILDERS:
            original(built, dataset_kwargs, **rest)
            came_from[config.task] = f"{config.dataset_path or 'the task file'}"
            return
        split = config.test_split or config.validation_split
        folders = _folders(task, config.task, config.dataset_name)
        file = _find(data_dir, folders, split)
        if file is not None and not _adapters_form(file):
            built.dataset = _local(built, file, shots)
            came_from[config.task] = str(file)
            return
        place = f"{folders[0]}/{split}.jsonl"
        name = " ".join(part for part in (config.dataset_path, config.dataset_name) if part)
        try:
            original(built, dataset_kwargs, **rest)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = reason_for(error, f"datasets/{config.dataset_path}") or " ".join(str(error).split())[:300]
            where = _nothing_fits(data_dir, folders, place)
            raise DataError(
                f"task {config.task}: {where}; {name} of the hub cannot be loaded: {reason}. "
                f"Put its split {split}, in its own columns, at DIR/{place} and give --data-dir DIR"
            ) from error
        came_from[config.task] = f"{name}, split {split}"

    ConfigurableTask.download = download
    try:
        yield came_from
    finally:
        ConfigurableTask.download = original


def check_rows(built: Any, came_from: str, limit: int | None) -> None:
    """Name the row of a local file that a task cannot make a question of.

    Raises:
        DataError: There is one.
    """
    for number, doc in enumerate(built.eval_docs):
        if number == limit:
            return
        try:
            built.doc_to_text(doc)
            target = built.doc_to_target(doc)
            choices = built.doc_to_choice(doc) if built.config.doc_to_choice is not None else None
            if choices is not None and isinstance(target, int) and not 0 <= target < len(choices):
                raise ValueError(f"the right answer is choice {target} of {len(choices)}")
        except Exception as error:  # whatever a template or function of the task stumbles over
            raise DataError(f"task {built.config.task}: {came_from}, row {number} does not fit: {_one_line(error)}") from error


def explain_local(error: Exception, task: str, came_from: Mapping[str, str]) -> DataError | None:
    """What to say of a task that could not be built; None where its rows are not to blame."""
    for name, file in came_from.items():
        if Path(file).is_file():
            columns = ", ".join(read_file(Path(file))[0])
            return DataError(
                f"task {name}: {file} lacks what the harness asks with ({_one_line(error)}); it has the columns {columns}. "
                "Expected are those of the data set that the harness itself reads"
            )
    return None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _folders(asked: str, built: str, subset: str | None) -> list[str]:
    """Folders in which a task's files may lie, the one to name in messages first."""
    known = KNOWN.get(asked) or next((one for one in KNOWN.values() if one.theirs in (asked, built)), None)
    names = list(known.folders) if known else []
    if known and known.theirs != built:  # a part of a group: a folder of its own in the group's
        return [*(f"{name}/{subset}" for name in names), built]
    names = list(dict.fromkeys([*names, built]))
    return names + [f"{name}/{subset}" for name in names if subset]


def _find(data_dir: Path | None, folders: Sequence[str], split: str | None) -> Path | None:
    if data_dir is None or split is None:
        return None
    for folder in folders:
        for suffix in _SUFFIXES:
            if (file := data_dir / folder / f"{split}{suffix}").is_file():
                return file
        # As the hub names them: test-00000-of-00001.parquet.
        if found := sorted((data_dir / folder).glob(f"{split}-00000-of-00001.parquet")):
            return found[0]
    return None


def _local(built: Any, file: Path, shots: int | None) -> datasets.DatasetDict:
    """The splits of a task from the folder of a file, which holds the rows that are scored."""
    config = built.config
    scored = config.test_split or config.validation_split
    found = {scored: _rows(config.task, file)}
    examples = config.fewshot_split
    if examples is None and not getattr(built.fewshot_cfg, "samples", None):
        examples = config.training_split or config.validation_split or config.test_split
    wanted = config.num_fewshot if shots is None or config.num_fewshot == 0 else shots
    if wanted and examples is not None and examples not in found:
        beside = _find(file.parent.parent, [file.parent.name], examples)
        if beside is None:
            raise DataError(
                f"task {config.task}: its {wanted} worked examples come from the split {examples}, and {file.parent} has no "
                f"{examples}.jsonl (or .json, .parquet); put it there, or ask for none with --shots 0"
            )
        found[examples] = _rows(config.task, beside)
    splits = (config.training_split, config.validation_split, config.test_split, config.fewshot_split)
    none = found[scored].select([])  # the harness looks at every split it knows, also where it takes nothing from it
    return datasets.DatasetDict({split: found.get(split, none) for split in splits if split is not None})


def _rows(task: str, file: Path) -> datasets.Dataset:
    rows = read_file(file)
    if not rows:
        raise DataError(f"task {task}: {file} has no rows")
    columns = rows[0].keys()
    for number, row in enumerate(rows):
        if row.keys() != columns:
            odd = ", ".join(sorted(row.keys() ^ columns))
            raise DataError(f"task {task}: {file}, row {number} differs from the first in its columns: {odd}")
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are children of these
        raise DataError(f"task {task}: {file} has columns of mixed types: {_one_line(error)}") from None


def _nothing_fits(data_dir: Path | None, folders: Sequence[str], place: str) -> str:
    """Why the local folder does not serve."""
    if data_dir is None:
        return "no --data-dir was given"
    for folder in folders:
        for stem in ("test", "validation", "train"):
            file = _find(data_dir, [folder], stem)
            if file is not None and _adapters_form(file):
                return (
                    f"{file} is in the form of LLM-Adapters ({', '.join(sorted(_FORM))}), which the protocol `paper` reads; "
                    "the harness needs the source's own columns"
                )
    return f"in {data_dir} there is no {place} (or .json, .parquet)"


def _adapters_form(file: Path) -> bool:
    rows = read_file(file)
    return bool(rows) and rows[0].keys() >= _FORM
