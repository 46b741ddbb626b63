"""Answers for many prompts: batches of like length, padded on the left, smaller ones where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from abba_cli.errors import ModelError
from abba_cli.evaluation.decoding import Decoding
from abba_cli.speakers import Speaker

_LOOK_EVERY = 8  # steps between two looks at the batch: decoding every row at every step costs more than the steps saved


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Args:
        number: Of the caller.
        ids: The prompt's tokens.
        stop: Texts that end the answer; they are not part of it.
        max_tokens: Longest answer.
    """

    number: int
    ids: tuple[int, ...]
    stop: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Completion:
    """An answer.

    Args:
        number: Of its request.
        text: Without special tokens and without the stop text.
        tokens: Generated for it, the end-of-turn token included.
        complete: Whether it ended by itself, rather than at the longest length.
    """

    number: int
    text: str
    tokens: int
    complete: bool


def default_batch_size(device: torch.device) -> int:
    """Where `--batch-size auto` starts: on a CPU larger batches gain little, a GPU takes what its memory holds."""
    return 16 if device.type == "cpu" else 128


def plan_batches(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Cut requests into batches, longest prompts first, so that what does not fit into memory shows at once.

    The plan does not depend on what is already answered: an evaluation that goes on asks in the same batches, and gets the same
    answers, as one that was never stopped.
    """
    ordered = sorted(requests, key=lambda request: (request.max_tokens, request.stop, len(request.ids)), reverse=True)
    batches: list[list[Request]] = []
    for request in ordered:
        like = batches and (batches[-1][0].max_tokens, batches[-1][0].stop) == (request.max_tokens, request.stop)
        if like and len(batches[-1]) < batch_size:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def within_positions(request: Request, positions: int | None) -> Request | None:
    """Shorten an answer to the positions that the model has; None where the prompt alone has no room."""
    room = request.max_tokens if positions is None else min(request.max_tokens, positions - len(request.ids))
    return None if room < 1 else Request(request.number, request.ids, request.stop, room)


def answer_batches(
    speaker: Speaker,
    batches: Sequence[Sequence[Request]],
    decoding: Decoding,
    on_smaller: Callable[[int], object] = lambda size: None,
    on_tokens: Callable[[int, int], object] = lambda tokens, most: None,
) -> Iterator[list[Completion]]:
    """Answer batches one after the other.

    Args:
        speaker: Who answers.
        batches: From `plan_batches`.
        decoding: How tokens are chosen.
        on_smaller: Called with the new batch size when memory ran out.
        on_tokens: Called every few steps with the tokens that the current batch has, and the most it may have.

    Yields:
        The answers of one batch.

    Raises:
        ModelError: Memory runs out with a single prompt.
    """
    size: int | None = None
    with _clean_defaults(speaker.model), speaker.model.disable_adapter() if speaker.adapter_off else nullcontext():
        for batch in batches:
            waiting = [list(batch)]
            while waiting:
                part = waiting.pop(0)
                if size is not None and len(part) > size:
                    waiting = [part[at : at + size] for at in range(0, len(part), size)] + waiting
                    continue
                if (answers := _try(speaker, part, decoding, on_tokens)) is None:
                    if len(part) == 1:
                        raise ModelError(
                            f"out of memory with one prompt of {len(part[0].ids):,} tokens at a time; load the model with "
                            "--quantization nf4, or use a device with more memory"
                        )
                    size = len(part) // 2
                    on_smaller(size)
                    waiting.insert(0, part)
                    continue
                yield answers


def _try(
    speaker: Speaker, batch: Sequence[Request], decoding: Decoding, on_tokens: Callable[[int, int], object]
) -> list[Completion] | None:
    """Answer a batch; None where memory ran out, after what it held is free again."""
    try:
        return _answer(speaker, batch, decoding, on_tokens)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    # Outside of the handler: the traceback keeps the tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _answer(
    speaker: Speaker, batch: Sequence[Request], decoding: Decoding, on_tokens: Callable[[int, int], object]
) -> list[Completion]:
    """Answer a batch. Rows that have ended leave it whenever they are half of it: those that go on then cost half."""
    tokenizer = speaker.template.tokenizer
    device = speaker.model.device
    length = max(len(request.ids) for request in batch)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(one.ids)) + list(one.ids) for one in batch], device=device)
    mask = torch.tensor([[0] * (length - len(one.ids)) + [1] * len(one.ids) for one in batch], device=device)
    ends = list(speaker.template.stop_token_ids)
    draw: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        draw = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        # By the batch, so that an evaluation that goes on draws what it would have drawn.
        torch.manual_seed(decoding.seed * 1_000_003 + batch[0].number)
    rows = list(range(len(batch)))
    said: list[list[int]] = [[] for _ in batch]
    cache = None
    left = batch[0].max_tokens
    while rows and left:
        watch = _Watch(tokenizer, ends, batch[0].stop, length, lambda tokens: on_tokens(tokens, batch[0].max_tokens))
        with torch.no_grad():
            output = speaker.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=left,
                eos_token_id=ends,
                pad_token_id=pad,
                use_cache=True,
                stopping_criteria=StoppingCriteriaList([watch]),
                return_dict_in_generate=True,
                **draw,
            )
        new = output.sequences[:, ids.shape[1] :]
        for row, tokens in zip(rows, new.tolist(), strict=True):
            said[row] += tokens
        left -= new.shape[1]
        going = (~watch.done).nonzero().flatten()
        rows = [rows[place] for place in going.tolist()]
        ids = output.sequences[going]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)[going]
        cache = _of_rows(getattr(output, "past_key_values", None), going)
    return [_completion(tokenizer, request, tokens, ends) for request, tokens in zip(batch, said, strict=True)]


def _of_rows(cache: Any, rows: torch.Tensor) -> Any:
    """The keys and values of some rows; None, which has them computed again, where a cache cannot be cut."""
    if not len(rows) or not isinstance(cache, DynamicCache):
        return None
    cache.batch_select_indices(rows)
    return cache


def _completion(tokenizer: Any, request: Request, row: list[int], ends: Sequence[int]) -> Completion:
    end = next((at for at, token in enumerate(row) if token in ends), None)
    kept = row if end is None else row[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    found = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
    text = text[: min(found)] if found else text
    return Completion(request.number, text, len(kept) + (end is not None), complete=end is not None or bool(found))


class _Watch(StoppingCriteria):
    """Sees which rows have ended, by a token or a stop text (looked for every few steps), and stops all when half have."""

    def __init__(
        self, tokenizer: Any, ends: Sequence[int], stop: Sequence[str], answer_from: int, on_tokens: Callable[[int], object]
    ) -> None:
        self.tokenizer, self.ends, self.stop, self.answer_from = tokenizer, ends, stop, answer_from
        self.on_tokens = on_tokens
        # A token is at least one byte, so this many tokens hold the longest stop text.
        self.window = max((len(text.encode()) for text in stop), default=0) + _LOOK_EVERY
        self.done = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not len(self.done):
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.done = self.done | torch.isin(input_ids[:, -1], torch.tensor(self.ends, device=input_ids.device))
        steps = input_ids.shape[1] - self.answer_from
        if steps % _LOOK_EVERY == 0:
            self.on_tokens(steps)
            if self.stop:
                tails = self.tokenizer.batch_decode(input_ids[:, max(self.answer_from, input_ids.shape[1] - self.window) :])
                found = [any(text in tail for text in self.stop) for tail in tails]
                self.done = self.done | torch.tensor(found, device=input_ids.device)
            if len(self.done) > 1 and int(self.done.sum()) * 2 >= len(self.done):
                return torch.ones_like(self.done)
        return self.done


@contextmanager
def _clean_defaults(model: Any) -> Iterator[None]:
    """Keep a checkpoint's own generation settings (a temperature, a repetition penalty) out of the answers."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own
