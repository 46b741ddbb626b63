"""Recipe -> tokenised, masked, audited data sets."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from abba_cli.batches import IGNORED, TokenRow, pack, tokenize
from abba_cli.errors import DataError
from abba_cli.formats import Example
from abba_cli.prepared import HeldOutPrompt, PreparedData, SourceAudit, Span, SplitAudit
from abba_cli.prompts import Template, encode_prompt, load_template
from abba_cli.recipe import DataSection
from abba_cli.sources import LoadedSource, load_source

ROWS_AT_ONCE = 1000

Progress = Callable[[int, int], None]


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
    splits = {"train": [load_source(source, seed) for source in data.train]}
    if data.eval:
        splits["eval"] = [load_source(source, seed) for source in data.eval]
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
        fingerprint=_fingerprint([one for one, _ in sets.values()]),
        template=template,
        first_row=first[1],
        first_spans=_spans(_encode(splits["train"][0], [first], data, template)[0], data, tokenizer),
        held_out=_held_out(splits.get("eval", []), template, samples),
    )


def _prepare_split(
    sources: Sequence[LoadedSource], data: DataSection, template: Template, advance: Callable[[int], None]
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
    source: LoadedSource, data: DataSection, template: Template, advance: Callable[[int], None]
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


def _examples(source: LoadedSource, rows: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[Example]:
    for number, row in rows:
        try:
            yield source.reader.read(row)
        except DataError as error:
            raise DataError(f"{source.section.path}, row {number}: {error}") from error


def _encode(
    source: LoadedSource, rows: Sequence[tuple[int, dict[str, Any]]], data: DataSection, template: Template
) -> list[TokenRow]:
    laid_out = []
    for (number, _), example in zip(rows, _examples(source, rows), strict=True):
        try:
            segments = template.segments(example, data.supervise == "assistant")
            "".join(segment.text for segment in segments).encode()
        except DataError as error:
            raise DataError(f"{source.section.path}, row {number}: {error}") from error
        except UnicodeEncodeError as error:
            found = error.object[error.start].encode("unicode-escape").decode()
            raise DataError(
                f"{source.section.path}, row {number}: {found} is half of a character that JSON writes in two; "
                "write the other half, too"
            ) from None
        laid_out.append(segments)
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


def _unsupervised(source: LoadedSource, lost: Sequence[tuple[int, int]], limit: int) -> DataError:
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


def _fingerprint(sets: Sequence[Dataset]) -> str:
    digest = hashlib.sha256()
    for dataset in sets:
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


def _held_out(sources: Sequence[LoadedSource], template: Template, samples: int) -> tuple[HeldOutPrompt, ...]:
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
