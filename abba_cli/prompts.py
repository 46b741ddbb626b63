"""One prompt template, used by training AND evaluation: what the model is given, and what it must answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from abba_cli.errors import DataError
from abba_cli.formats import Example, Message, Row, compile_template
from abba_cli.rendering import RENDERING_ERRORS, within_limits

ALPACA = (
    "Below is an instruction that describes a task"
    "{% if input %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_TURN = "### Instruction:\n{{ prompt }}\n\n{% if input %}### Input:\n{{ input }}\n\n{% endif %}### Response:"

NAMED_LAYOUTS = {
    "none": "{% if system %}{{ system }}\n\n{% endif %}{{ prompt }}{% if input %}{{ '\n\n' + input }}{% endif %}",
    # Wording of https://github.com/tatsu-lab/stanford_alpaca/blob/761dc5bf/train.py#L31; no newline after "Response:".
    # ABBA's own runs use the same: https://github.com/CERT-Lab/abba/blob/9ef120cf/utils/data_utils.py#L24
    "alpaca": "{% if system %}{{ system }}\n\n{% endif %}{% if turn == 0 %}" + ALPACA + "{% endif %}" + ALPACA_TURN,
}

# Llama 3's template writes today's date into the prompt unless it is told one: a run must not change over night.
FIXED_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Segment:
    """A stretch of a row's text.

    Attributes:
        text: The text; special tokens are written out.
        answer: Whether the model has to produce it (its end-of-turn token included).
    """

    text: str
    answer: bool


@dataclass(frozen=True)
class LayoutTemplate:
    """Prompt and answer laid out by a Jinja template; every answer ends with the tokenizer's end-of-sequence token.

    The Jinja template renders the prompt of one turn from these variables:
        prompt: The user's text since the previous answer.
        input: What it refers to (Alpaca's `input`), or "".
        system: The system message in the first turn, or "".
        messages: All messages before this turn's answer, each with `role` and `content`.
        turn: Number of the turn, from 0.
    As in chat templates, the newline after a block tag is dropped, and so is the one at the end of the file.

    Attributes:
        name: none, alpaca, or the path of the Jinja file.
        render: The compiled Jinja template.
        tokenizer: Supplies the end-of-sequence token.
    """

    name: str
    render: Callable[[Row], str]
    tokenizer: PreTrainedTokenizerBase

    def prompt_text(self, example: Example) -> str:
        """Return what the model is given before its last answer; tokenise it with `encode_prompt`."""
        return "".join(segment.text for segment in self.segments(example)[:-1])

    def segments(self, example: Example, every_answer: bool = False) -> list[Segment]:
        """Lay a row out.

        Args:
            example: The row.
            every_answer: Mark every assistant message as an answer, not only the last one.

        Returns:
            The stretches of the row in order; the last one is the last answer, or "" where the row has none.
        """
        eos = str(self.tokenizer.eos_token)
        if example.text is not None:
            return _text_segments(example.text, eos)
        segments: list[Segment] = []
        pending: list[Message] = []
        turn = 0
        last = len(example.messages) - 1
        for index, message in enumerate(example.messages):
            if message.role != "assistant":
                pending.append(message)
            if message.role == "assistant" or index == last:
                answered = message.role == "assistant"
                variables = {
                    "prompt": "\n\n".join(one.content for one in pending if one.role != "system"),
                    "input": example.input if index == last else "",
                    "system": "\n\n".join(one.content for one in pending if one.role == "system"),
                    "messages": as_dicts(example.messages[: index + (not answered)]),
                    "turn": turn,
                }
                answer = message.content + eos if answered and message.content.strip() else ""
                segments += [Segment(self.render(variables), False), Segment(answer, every_answer or index == last)]
                pending, turn = [], turn + 1
        return segments

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return (_eos_id(self.tokenizer),)


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template.

    Attributes:
        tokenizer: A tokenizer with a chat template.
        bos: The text of the beginning-of-sequence token if the tokenizer adds it by itself, else "".
        end_marks: Texts of all special tokens; one of them ends a turn.
        name: Always chat.
    """

    tokenizer: PreTrainedTokenizerBase
    bos: str
    end_marks: tuple[str, ...]
    name: str = "chat"

    def prompt_text(self, example: Example) -> str:
        """Return what the model is given before its last answer; tokenise it with `encode_prompt`."""
        if example.text is not None:
            return ""
        messages = _with_input(example)
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        return self._render(asked, generation_prompt=True)

    def segments(self, example: Example, every_answer: bool = False) -> list[Segment]:
        """Lay a row out.

        Args:
            example: The row.
            every_answer: Mark every assistant message as an answer, not only the last one.

        Returns:
            The stretches of the row in order; the last one is the last answer, or "" where the row has none.

        Raises:
            DataError: The chat template refuses the conversation, or rewrites an earlier answer beyond recognition.
        """
        if example.text is not None:
            return _text_segments(example.text, str(self.tokenizer.eos_token))
        prompt = self.prompt_text(example)
        if not example.answer.strip():
            return [Segment(prompt, False), Segment("", True)]
        messages = _with_input(example)
        whole = self._render(messages)
        earlier = self._earlier_answers(messages, whole, len(prompt)) if every_answer else []
        return [*_cut(prompt, earlier), Segment(self._last_answer(messages[-1].content, prompt, whole), True)]

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the template's end-of-turn token and the end-of-sequence token."""
        probe = Example((Message("user", "a"), Message("assistant", "b")))
        end = self.tokenizer(self.segments(probe)[-1].text, add_special_tokens=False)["input_ids"][-1]
        return tuple(dict.fromkeys((end, _eos_id(self.tokenizer))))

    def _last_answer(self, content: str, prompt: str, whole: str) -> str:
        """Return the text after the prompt, up to and with the end-of-turn token.

        A template whose generation prompt is not part of its own finished text (one that opens a <think> block, say) is
        answered the way it is asked: the generation prompt, then the content as the template writes it.
        """
        if whole.startswith(prompt):
            answer = whole[len(prompt) :]
        else:
            start = whole.rfind(content.strip())
            if start < 0:
                raise DataError(f"the chat template does not write out the answer {content[:40]!r}: use another data.template")
            answer = whole[start:]
        trimmed = answer.rstrip()
        return trimmed if trimmed.endswith(self.end_marks) else answer + str(self.tokenizer.eos_token)

    def _earlier_answers(self, messages: Sequence[Message], whole: str, end: int) -> list[tuple[int, int]]:
        """Find the spans of all answers but the last in the text before `end`."""
        spans = []
        for index, message in enumerate(messages[:-1]):
            if message.role != "assistant":
                continue
            asked = self._render(messages[:index], generation_prompt=True)
            answered = self._render(messages[: index + 1])
            if whole.startswith(answered) and answered.startswith(asked) and len(answered) <= end:
                spans.append((len(asked), len(asked) + len(answered[len(asked) :].rstrip())))
                continue
            # The template writes earlier answers in another way than the last one (it drops <think> blocks, say).
            content = message.content.split("</think>")[-1].strip()
            tail = answered[answered.rfind(content) + len(content) :].rstrip()
            start = whole.find(content + tail, spans[-1][1] if spans else 0, end)
            if start < 0:
                raise DataError(
                    f"the chat template rewrites the earlier answer {message.content[:40]!r}, so that it cannot be "
                    "supervised: set data.supervise to completion"
                )
            spans.append((start, start + len(content + tail)))
        return spans

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Render without the beginning-of-sequence token that the tokenizer itself adds."""
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation_prompt, "date_string": FIXED_DATE}
        what = f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'}"
        try:
            text = within_limits(what, lambda: self.tokenizer.apply_chat_template(as_dicts(messages), **settings))
        except RENDERING_ERRORS as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"the chat template refuses a conversation of the roles {roles}: {error}") from error
        assert isinstance(text, str)
        return text.removeprefix(self.bos)


Template = LayoutTemplate | ChatTemplate
"""Both have `prompt_text(example)`, `segments(example, every_answer)`, `stop_token_ids` and `tokenizer`."""


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the prompt template of a recipe.

    Args:
        name: none, alpaca, chat, or the path of a Jinja file (its variables are documented at LayoutTemplate).
        tokenizer: The tokenizer of the base model.

    Returns:
        The template.

    Raises:
        DataError: The tokenizer has no end-of-sequence token or (chat) no chat template, or the file cannot be used.
    """
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could ever end: set its eos_token")
    if tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"] != [tokenizer.eos_token_id]:
        raise DataError(f"the tokenizer splits its end-of-sequence token {tokenizer.eos_token!r}: no answer could ever end")
    if name == "chat":
        if not tokenizer.chat_template:
            raise DataError(
                "data.template is chat, but the tokenizer has no chat template: set it to alpaca, none or a Jinja file"
            )
        bos = str(tokenizer.bos_token) if leading_ids(tokenizer) else ""
        return ChatTemplate(tokenizer, bos, (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()))
    layout = NAMED_LAYOUTS[name] if name in NAMED_LAYOUTS else _read_layout(name)
    return LayoutTemplate(name, compile_template(layout, f"the prompt template {name}"), tokenizer)


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise a prompt text the way training does: the beginning-of-sequence token once, no end-of-sequence token."""
    return leading_ids(tokenizer) + list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text by itself: its beginning-of-sequence token, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _read_layout(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.template is {name!r}: expected none, alpaca, chat or a readable Jinja file ({type(error).__name__})"
        ) from error


def _text_segments(text: str, eos: str) -> list[Segment]:
    return [Segment("", False), Segment(text + eos if text.strip() else "", True)]


def _with_input(example: Example) -> tuple[Message, ...]:
    """Return the messages with the example's input appended to the last user message."""
    messages = list(example.messages)
    asked = max((index for index, message in enumerate(messages) if message.role == "user"), default=None)
    if example.input and asked is not None:
        messages[asked] = Message("user", f"{messages[asked].content}\n\n{example.input}")
    return tuple(messages)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    """Cut a text into segments; the spans are answers."""
    segments, position = [], 0
    for start, end in spans:
        segments += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    return [*segments, Segment(text[position:], False)]


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id
