"""Segments become token rows, token rows become batches: masks, padding and packing.

Shapes: B rows in a batch, T tokens in the longest row, N tokens of all rows together.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abba_cli.errors import ModelError
from abba_cli.prompts import Segment, leading_ids

IGNORED = -100
"""Label of a token on which no loss is taken."""


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row, uncut.

    Attributes:
        input_ids: Its tokens.
        answers: For every token, whether the model has to produce it.
    """

    input_ids: list[int]
    answers: list[bool]


def tokenize(rows: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """Tokenise laid-out rows and mark the answers' tokens.

    A row is tokenised as one text where no token crosses from one segment into the next and the prompt alone gives the
    same tokens; otherwise segment by segment, because the model will see the prompt alone when it answers.

    Args:
        rows: The segments of each row, the last one being its answer.
        tokenizer: The tokenizer; a beginning-of-sequence token that it adds by itself is put before the row, once.

    Returns:
        One TokenRow for each row.
    """
    head = leading_ids(tokenizer)
    joint = _joint(rows, tokenizer) if tokenizer.is_fast else [None] * len(rows)
    return [
        TokenRow([*head, *row.input_ids], [False] * len(head) + row.answers)
        for row in (one or _separate(segments, tokenizer) for one, segments in zip(joint, rows, strict=True))
    ]


def _joint(rows: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase) -> list[TokenRow | None]:
    """Tokenise every row as one text; None where that does not respect its segments."""
    texts = ["".join(segment.text for segment in segments) for segments in rows]
    whole = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    prompts = ["".join(segment.text for segment in segments[:-1]) for segments in rows]
    alone = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    found: list[TokenRow | None] = []
    for segments, ids, offsets, prompt in zip(rows, whole["input_ids"], whole["offset_mapping"], alone, strict=True):
        answers = _answer_tokens(segments, offsets) if ids[: len(prompt)] == prompt else None
        found.append(None if answers is None else TokenRow(ids, answers))
    return found


def _answer_tokens(segments: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[bool] | None:
    """Give every token its segment's mark; None when a token lies in two segments."""
    ends = list(accumulate(len(segment.text) for segment in segments))
    marks, index = [], 0
    for start, end in offsets:
        while index < len(ends) - 1 and start >= ends[index]:
            index += 1
        if end > ends[index]:
            return None
        marks.append(segments[index].answer)
    return marks


def _separate(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Tokenise segment by segment."""
    ids: list[int] = []
    marks: list[bool] = []
    for segment in segments:
        if segment.text:
            tokens = tokenizer(segment.text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += tokens
            marks += [segment.answer] * len(tokens)
    return TokenRow(ids, marks)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into as few sequences as best-fit-decreasing finds.

    Args:
        lengths: Tokens of each row, none above `capacity`.
        capacity: Tokens of a sequence.

    Returns:
        The row numbers of every sequence. Each row occurs once, no sequence exceeds the capacity, and the same lengths
        give the same packing.
    """
    sequences: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted keys of open_by_room
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, lengths[row])
        if place < len(rooms):
            room = rooms[place]
            sequence = open_by_room[room].pop()
            sequences[sequence].append(row)
            if not open_by_room[room]:
                del open_by_room[room], rooms[place]
        else:
            room = capacity
            sequence = len(sequences)
            sequences.append([row])
        left = room - lengths[row]
        if left not in open_by_room:
            insort(rooms, left)
        open_by_room.setdefault(left, []).append(sequence)
    return sequences


def grouped_by_length(lengths: Sequence[int], batch: int, seed: int, window: int = 50) -> list[int]:
    """Order rows so that those of a batch are about equally long, and little of it is padding.

    Rows are drawn at random in windows of many batches, sorted within a window, cut into batches, and the batches are drawn at
    random: each is still a sample of the data, and no stretch of the training has only short or only long rows.

    Args:
        lengths: Tokens of each row.
        batch: Rows that are computed side by side.
        seed: Decides the order.
        window: Batches in a window.

    Returns:
        Every row number once. What is no whole batch comes last.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(rows) - len(rows) % batch
    batches = []
    for start in range(0, whole, window * batch):
        drawn = sorted(rows[start : min(start + window * batch, whole)], key=lambda row: lengths[row])
        batches += [drawn[first : first + batch] for first in range(0, len(drawn), batch)]
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [row for number in order for row in batches[number]] + rows[whole:]


@dataclass(frozen=True)
class PaddedBatches:
    """Collator for rows of input_ids and labels: padded on the right, masked by position.

    Attributes:
        pad_id: Id to fill with; it may equal the end-of-sequence token, because no mask is derived from it.
        multiple: Batch lengths are rounded up to a multiple of this.
    """

    pad_id: int
    multiple: int = 8

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, labels and attention_mask, all int64 [B, T]."""
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // self.multiple) * self.multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.tensor(row["input_ids"])
            batch["labels"][index, :length] = torch.tensor(row["labels"])
            batch["attention_mask"][index, :length] = 1
        return batch


@dataclass(frozen=True)
class PackedBatches:
    """Collator for packed sequences (input_ids, labels, document_lengths): flattened into one row, without padding.

    No attention_mask is returned on purpose, and use_cache is off: transformers separates documents by restarting
    position_ids only when it has neither a mask nor a cache (`_preprocess_mask_arguments` in masking_utils.py, 5.23).
    """

    def __call__(self, sequences: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | bool]:
        """Return input_ids, labels and position_ids, all int64 [1, N], and use_cache=False."""
        documents = [length for sequence in sequences for length in sequence["document_lengths"]]
        return {
            "input_ids": torch.tensor([[token for sequence in sequences for token in sequence["input_ids"]]]),
            "labels": torch.tensor([[label for sequence in sequences for label in sequence["labels"]]]),
            "position_ids": torch.cat([torch.arange(length) for length in documents])[None],
            "use_cache": False,
        }


def separates_documents(model: PreTrainedModel | PeftModel) -> bool:
    """Say whether the packed documents of a batch stay invisible to each other in this model.

    Architecture, attention implementation and custom code all matter, so the model is asked: how much do a second
    document's logits change with the tokens of the first, packed, compared to one undivided document? Dense models
    change by nothing at all; the margin is for layers whose rounding depends on the whole batch (experts, int8).

    Args:
        model: A causal language model with at least 32 tokens, on its device; with or without an adapter.

    Returns:
        False for models with recurrent or convolutional state, with positions that they count themselves, and the like.
    """
    margin = min(0.01, 100 * torch.finfo(model.dtype).eps)
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            return _influence(model, [8, 8]) <= margin * _influence(model, [16])
    except TypeError:  # the model's forward has no position_ids
        return False
    finally:
        model.train(training)


def require_separation(model: PreTrainedModel | PeftModel) -> None:
    """Stop before a packed run in which documents would see each other.

    Args:
        model: The model to train, on its device.

    Raises:
        ModelError: `separates_documents` is false.
    """
    if not separates_documents(model):
        raise ModelError(
            f"packed rows would see each other in this model ({model.config.model_type}, attention "
            f"{model.config._attn_implementation}): set data.packing to false, or try model.attention: sdpa"
        )


def _influence(model: PreTrainedModel | PeftModel, document_lengths: list[int]) -> float:
    """Return the mean change of the last 8 of 16 tokens' logits when the first 8 tokens are others."""
    logits = []
    for start in (16, 24):
        sequence = {
            "input_ids": [*range(start, start + 8), *range(8, 16)],
            "labels": [IGNORED] * 16,
            "document_lengths": document_lengths,
        }
        batch = PackedBatches()([sequence])
        on_device = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        del on_device["labels"]
        logits.append(model(**on_device).logits[0, 8:].float())
    return float((logits[0] - logits[1]).abs().mean())
