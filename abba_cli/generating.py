"""Answering a conversation token by token."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from abba_cli.errors import DataError
from abba_cli.formats import Example, Message
from abba_cli.prompts import encode_prompt
from abba_cli.speakers import Speaker


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw from the likeliest tokens that have this probability together.
        seed: Of the draws; None draws anew each time.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        text: Without special tokens.
        tokens: Of the answer, the end-of-turn token included.
        seconds: From the prompt on.
        complete: False where the user stopped it; tokens and seconds are then unknown.
    """

    text: str
    tokens: int
    seconds: float
    complete: bool = True


def answer(
    speaker: Speaker, messages: Sequence[Message], sampling: Sampling, on_text: Callable[[str], object] = lambda text: None
) -> Answer:
    """Answer the last message.

    Args:
        speaker: Who answers.
        messages: The conversation so far, which ends with the user's message.
        sampling: How tokens are chosen.
        on_text: Called with each new stretch of text; together they are the answer.

    Raises:
        DataError: The conversation is longer than the model's positions, or the template refuses it.
    """
    tokenizer = speaker.template.tokenizer
    ids = prompt_ids(speaker, messages)
    room = sampling.max_tokens
    if speaker.positions is not None:
        room = min(room, speaker.positions - len(ids))
        if room < 1:
            raise DataError(
                f"the prompt has {len(ids):,} tokens, and {speaker.label} has positions for {speaker.positions:,}, the answer's "
                "included; shorten it"
            )
    draw: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # Without a seed torch starts every process with the same one.
        torch.manual_seed(sampling.seed) if sampling.seed is not None else torch.seed()
    tokens = torch.tensor([ids], device=speaker.model.device)
    streamer = _Stream(tokenizer, on_text)
    start = time.perf_counter()
    with speaker.model.disable_adapter() if speaker.adapter_off else nullcontext(), torch.no_grad():
        speaker.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            eos_token_id=list(speaker.template.stop_token_ids),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            streamer=streamer,
            **draw,
        )
    return Answer(streamer.text, len(streamer.ids), time.perf_counter() - start)


def prompt_ids(speaker: Speaker, messages: Sequence[Message]) -> list[int]:
    """Tokenise a conversation up to the answer that is asked for, the way training does."""
    return encode_prompt(speaker.template.prompt_text(Example(tuple(messages))), speaker.template.tokenizer)


def within_positions(speaker: Speaker, messages: Sequence[Message], sampling: Sampling) -> list[Message]:
    """Drop the oldest turns of a conversation until it and its answer fit the model's positions.

    Returns:
        The system message, if there is one, and the turns that fit; the last message always stays.
    """
    kept = list(messages)
    if speaker.positions is None:
        return kept
    room = speaker.positions - min(sampling.max_tokens, speaker.positions // 2)
    first = 1 if kept[0].role == "system" else 0
    while len(kept) > first + 1 and len(prompt_ids(speaker, kept)) > room:
        del kept[first : first + 2]  # a question and its answer
    return kept


class _Stream(BaseStreamer):
    """Hands on the answer's text as it grows.

    The whole answer is decoded each time: tokenizers of the SentencePiece kind drop a leading space, so pieces that are
    decoded apart do not add up (transformers' `TextStreamer` starts a new piece at every newline).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.text = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._hand_on(self._decoded())

    def end(self) -> None:
        self._hand_on(self._decoded(), last=True)

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _hand_on(self, text: str, last: bool = False) -> None:
        if not last and text.endswith("\ufffd"):
            return  # a character whose last bytes are still to come
        if len(text) > len(self.text):
            new, self.text = text[len(self.text) :], text
            self.on_text(new)
