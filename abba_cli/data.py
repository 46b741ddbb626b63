"""Recipe -> tokenised, masked, audited data sets."""

import csv
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
from datasets import Dataset, ReadInstruction
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from abba_cli.batches import IGNORED, TokenRow, pack, tokenize
from abba_cli.errors import DataError
from abba_cli.formats import Example, Reader, reader_for
from abba_cli.prompts import Template, encode_prompt, load_template
from abba_cli.recipe import DataSection, SourceSection

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
ROWS_AT_ONCE = 1000

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
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SourceAudit:
    """What became of one source's rows.

    Attributes:
        path: The source as the recipe names it.
        split: Its split.
        shape: How its rows are read.
        unused_columns: Columns that are not read.
        sha256: Digest of each file read, by path; empty for a hub data set.
        rows_found: Rows after split and max_rows.
        rows: Rows used, after weight and dropping.
        tokens: Tokens of the rows used.
        supervised_tokens: Tokens on which the loss is taken.
        truncated_rows: Rows cut at max_length_tokens.
        unsupervised_rows: Rows dropped because nothing in them is supervised.
        longest_row_tokens: Tokens of the longest row before cutting.
    """

    path: str
    split: str
    shape: str
    unused_columns: tuple[str, ...]
    sha256: dict[str, str]
    rows_found: int
    rows: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    unsupervised_rows: int
    longest_row_tokens: int


@dataclass(frozen=True)
class SplitAudit:
    """What became of the training or the evaluation rows.

    Attributes:
        sources: One audit a source, in the recipe's order.
        packed_sequences: Sequences after packing; None without packing.
    """

    sources: tuple[SourceAudit, ...]
    packed_sequences: int | None

    @property
    def rows(self) -> int:
        """Rows used, of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of the rows used."""
        return sum(source.tokens for source in self.sources)

    @property
    def supervised_share(self) -> float:
        """Share of the tokens on which the loss is taken."""
        return sum(source.supervised_tokens for source in self.sources) / self.tokens

    @property
    def truncated_rows(self) -> int:
        """Rows cut at max_length_tokens."""
        return sum(source.truncated_rows for source in self.sources)

    @property
    def longest_row_tokens(self) -> int:
        """Tokens of the longest row before cutting."""
        return max(source.longest_row_tokens for source in self.sources)


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered row: its text, and whether the loss is taken on it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt of an evaluation source, to be answered during training.

    Attributes:
        source: Path of its source.
        row: Its number there, from 0.
        text: What the model is given.
        input_ids: The same as tokens.
        reference: The answer of the data set.
    """

    source: str
    row: int
    text: str
    input_ids: tuple[int, ...]
    reference: str


@dataclass(frozen=True)
class PreparedData:
    """Everything that training needs to know of the data.

    Attributes:
        train: Columns input_ids and labels (-100 where unsupervised); document_lengths besides when packed.
        eval: The same for the held-out rows; None without eval sources.
        audit: By split name, `train` and (if there is one) `eval`.
        fingerprint: SHA-256 over the training rows' ids and labels, in order.
        template: The prompt template used.
        first_row: The first training row as it was found.
        first_spans: The same row as the model sees it.
        held_out: Prompts for sample generations.
    """

    train: Dataset
    eval: Dataset | None
    audit: dict[str, SplitAudit]
    fingerprint: str
    template: Template
    first_row: dict[str, Any]
    first_spans: tuple[Span, ...]
    held_out: tuple[HeldOutPrompt, ...]


@dataclass(frozen=True)
class _Loaded:
    """One source in memory: its numbered rows and how to read them."""

    section: SourceSection
    rows: list[tuple[int, dict[str, Any]]]
    found: int
    reader: Reader
    sha256: dict[str, str]


def prepare(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    samples: int = 0,
    progress: Progress | None = None,
) -> PreparedData:
    """Load, lay out, tokenise, mask and audit the rows of a recipe.

    Args:
        data: The recipe's data section; local paths are absolute.
        tokenizer: The base model's tokenizer.
        seed: Chooses the rows of a source with a fractional weight.
        samples: How many held-out prompts to return, spread evenly over the evaluation rows.
        progress: Called with the rows tokenised so far and the rows of all sources.

    Returns:
        The prepared data. The same recipe, files, tokenizer and seed give the same rows in the same order.

    Raises:
        DataError: A source cannot be had or read, fits no shape, is empty, or has rows without anything to learn.
    """
    template = load_template(data.template, tokenizer)
    splits = {"train": [_load(source, seed) for source in data.train]}
    if data.eval:
        splits["eval"] = [_load(source, seed) for source in data.eval]
    total = sum(len(source.rows) for sources in splits.values() for source in sources)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    sets = {name: _prepare_split(sources, data, template, advance) for name, sources in splits.items()}
    train = sets["train"][0]
    first = splits["train"][0].rows[0]
    return PreparedData(
        train=train,
        eval=sets["eval"][0] if "eval" in sets else None,
        audit={name: audit for name, (_, audit) in sets.items()},
        fingerprint=_fingerprint(train),
        template=template,
        first_row=first[1],
        first_spans=_spans(_encode(splits["train"][0], [first], data, template)[0], data, tokenizer),
        held_out=_held_out(splits.get("eval", []), template, samples),
    )


def _prepare_split(
    sources: Sequence[_Loaded], data: DataSection, template: Template, advance: Callable[[int], None]
) -> tuple[Dataset, SplitAudit]:
    tables, audits = [], []
    for source in sources:
        table, audit = _prepare_source(source, data, template, advance)
        tables.append(table)
        audits.append(audit)
    table = pa.concat_tables(tables).combine_chunks()
    if not data.packing:
        return Dataset(table), SplitAudit(tuple(audits), None)
    packed = _pack_table(table, data.max_length_tokens)
    return Dataset(packed), SplitAudit(tuple(audits), packed.num_rows)


def _prepare_source(
    source: _Loaded, data: DataSection, template: Template, advance: Callable[[int], None]
) -> tuple[pa.Table, SourceAudit]:
    limit = data.max_length_tokens
    tables: list[pa.Table] = []
    lost: list[tuple[int, int]] = []
    supervised = truncated = longest = 0
    for start in range(0, len(source.rows), ROWS_AT_ONCE):
        batch = source.rows[start : start + ROWS_AT_ONCE]
        kept: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for (number, _), row in zip(batch, _encode(source, batch, data, template), strict=True):
            longest = max(longest, len(row.input_ids))
            labels = _labels(row, data)[:limit]
            learnt = len(labels) - labels.count(IGNORED)
            if not learnt:
                lost.append((number, _tokens_needed(row)))
                continue
            supervised += learnt
            truncated += len(row.input_ids) > limit
            kept["input_ids"].append(row.input_ids[:limit])
            kept["labels"].append(labels)
        tables.append(_as_table(kept))
        advance(len(batch))
    table = pa.concat_tables(tables)
    if lost and (not table.num_rows or not data.allow_unsupervised_rows):
        raise _unsupervised(source, lost, limit)
    audit = SourceAudit(
        path=source.section.path,
        split=source.section.split,
        shape=source.reader.shape,
        unused_columns=tuple(column for column in source.rows[0][1] if column not in source.reader.columns),
        sha256=source.sha256,
        rows_found=source.found,
        rows=table.num_rows,
        tokens=int(pc.sum(table.column("input_ids").combine_chunks().value_lengths()).as_py()),
        supervised_tokens=supervised,
        truncated_rows=truncated,
        unsupervised_rows=len(lost),
        longest_row_tokens=longest,
    )
    return table, audit


def _examples(source: _Loaded, rows: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[Example]:
    for number, row in rows:
        try:
            yield source.reader.read(row)
        except DataError as error:
            raise DataError(f"{source.section.path}, row {number}: {error}") from error


def _encode(source: _Loaded, rows: Sequence[tuple[int, dict[str, Any]]], data: DataSection, template: Template) -> list[TokenRow]:
    laid_out = []
    for (number, _), example in zip(rows, _examples(source, rows), strict=True):
        try:
            laid_out.append(template.segments(example, data.supervise == "assistant"))
        except DataError as error:
            raise DataError(f"{source.section.path}, row {number}: {error}") from error
    return tokenize(laid_out, template.tokenizer)


def _labels(row: TokenRow, data: DataSection) -> list[int]:
    """Return the labels; the first token has none because nothing predicts it."""
    everything = data.supervise == "all"
    wanted = zip(row.input_ids, row.answers, strict=True)
    labels = [token if everything or answer else IGNORED for token, answer in wanted]
    return [IGNORED, *labels[1:]]


def _tokens_needed(row: TokenRow) -> int:
    """Return the length that would keep the row's first supervised token; 0 when it has none at all."""
    return next((index + 1 for index, answer in enumerate(row.answers) if answer and index), 0)


def _unsupervised(source: _Loaded, lost: Sequence[tuple[int, int]], limit: int) -> DataError:
    """Say how many rows teach nothing, name one, and what to do."""
    every = len(lost) == len(source.rows)
    which = f"all {len(lost)} rows" if every else f"{len(lost)} of {len(source.rows)} rows"
    drop = "" if every else ", or drop such rows with data.allow_unsupervised_rows: true"
    cut = [(number, needed) for number, needed in lost if needed]
    if not cut:
        return DataError(f"{which} of {source.section.path} have an empty answer (row {lost[0][0]}): fill it in{drop}")
    number, needed = max(cut, key=lambda one: one[1])
    least = min(needed for _, needed in cut)
    return DataError(
        f"{which} of {source.section.path} are cut before their answer begins: data.max_length_tokens is {limit}, "
        f"row {number} needs at least {needed}"
        + (f", the shortest at least {least}" if least < needed else "")
        + f": raise it{drop}"
    )


def _as_table(columns: dict[str, list[list[int]]]) -> pa.Table:
    return pa.table({name: pa.array(rows, pa.list_(pa.int32())) for name, rows in columns.items()})


def _pack_table(table: pa.Table, capacity: int) -> pa.Table:
    """Join rows into sequences; the first token of every row has no label already, so none is learnt across borders."""
    lengths = table.column("input_ids").chunk(0).value_lengths().to_pylist()
    sequences = pack(lengths, capacity)
    documents = [[lengths[row] for row in sequence] for sequence in sequences]
    ends = pa.array([0, *accumulate(map(sum, documents))], pa.int32())
    ordered = table.take([row for sequence in sequences for row in sequence]).combine_chunks()
    columns = {name: pa.ListArray.from_arrays(ends, ordered.column(name).chunk(0).flatten()) for name in ("input_ids", "labels")}
    return pa.table({**columns, "document_lengths": pa.array(documents, pa.list_(pa.int32()))})


def _fingerprint(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for name in dataset.column_names:
        column = dataset.data.table.column(name).combine_chunks()
        digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _spans(row: TokenRow, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> tuple[Span, ...]:
    limit = data.max_length_tokens
    labels = _labels(row, data)[:limit]
    spans: list[tuple[list[int], bool]] = []
    for token, label in zip(row.input_ids[:limit], labels, strict=True):
        if not spans or spans[-1][1] != (label != IGNORED):
            spans.append(([], label != IGNORED))
        spans[-1][0].append(token)
    return tuple(Span(str(tokenizer.decode(tokens)), supervised) for tokens, supervised in spans)


def _held_out(sources: Sequence[_Loaded], template: Template, samples: int) -> tuple[HeldOutPrompt, ...]:
    """Take `samples` prompts, spread evenly over the evaluation rows; plain text has none."""
    rows = [(source, number, row) for source in sources for number, row in source.rows if source.reader.shape != "text"]
    wanted = min(samples, len(rows))
    prompts = []
    for source, number, row in (rows[index * len(rows) // wanted] for index in range(wanted)):
        example = next(_examples(source, [(number, row)]))
        text = template.prompt_text(example)
        ids = tuple(encode_prompt(text, template.tokenizer))
        prompts.append(HeldOutPrompt(source.section.path, number, text, ids, example.answer))
    return tuple(prompts)


# Sources: what a recipe names -> rows in memory.


def _load(source: SourceSection, seed: int) -> _Loaded:
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
    return _Loaded(source, [(number, rows[number]) for number in numbers], len(rows), reader, sha256)


def _read(source: SourceSection) -> tuple[Rows, dict[str, str]]:
    """Return a source's rows of its split and the digests of its files."""
    path = _local_path(source.path)
    if path is None:
        return _read_hub(source), {}
    wanted = source.split.partition("[")[0]
    files = _files(path)
    rows = {name: [row for file in group for row in _read_file(file)] for name, group in files.items() if name == wanted}
    sizes = {name: len(rows.get(name, ())) for name in files}
    try:
        [part] = ReadInstruction.from_spec(source.split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source.path} has no split `{source.split}`: expected {' or '.join(sizes)}, with an optional slice such "
            "as train[:1000] or train[10%:]"
        ) from error
    sha256 = {}
    for file in files[wanted]:
        with file.open("rb") as stream:
            sha256[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return rows[wanted][part.from_ : part.to], sha256


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


def _read_file(path: Path) -> Rows:
    """Read one data file by its suffix; what is neither parquet, csv nor txt is taken for JSON."""
    try:
        if path.suffix == ".parquet":
            return list(parquet.read_table(path).to_pylist())
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowInvalid) as error:
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
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {str(row)[:40]!r}, expected an object with named columns")
    return list(rows)


def _read_hub(source: SourceSection) -> Rows:
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
