"""One row of any known shape becomes one Example; templates of a source are rendered here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2 import Template as JinjaTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment

from abba_cli.errors import DataError
from abba_cli.rendering import RENDERING_ERRORS, within_limits

Row = Mapping[str, Any]

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("problem", "solution"),
)
"""Column pairs that are read as prompt and answer; the first pair whose two columns exist is taken."""

CONTEXT_COLUMNS = ("input", "context")
"""Columns that complete an `instruction`: Alpaca's and Dolly's."""

CONVERSATIONS = ("messages", "conversations")
"""Columns that hold a list of messages, written as role/content or as from/value."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Roles as data sets write them, and the role a chat template knows."""

KNOWN_SHAPES = ", ".join([*(f"{a}/{b}" for a, b in PAIRS), *CONVERSATIONS, "text"])


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: Its text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One row, normalised: a conversation that ends with the answer to learn, or plain text.

    Attributes:
        messages: The conversation; empty for plain text.
        input: What the last user message refers to (Alpaca's `input`); the Alpaca prompt has its own place for it.
        text: Plain text to continue; None for a conversation.
    """

    messages: tuple[Message, ...] = ()
    input: str = ""
    text: str | None = None

    @property
    def answer(self) -> str:
        """The last assistant message, or "" when the row has none."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == "assistant" else ""


@dataclass(frozen=True)
class Reader:
    """How the rows of one source are read.

    Attributes:
        shape: The shape in words, for the audit.
        columns: The columns that are read; all others have no influence.
        read: Turns one row into an Example; raises DataError for values that do not fit.
    """

    shape: str
    columns: tuple[str, ...]
    read: Callable[[Row], Example]


def reader_for(columns: Sequence[str], prompt: str | None = None, completion: str | None = None) -> Reader:
    """Choose how to read rows with these columns.

    Args:
        columns: The columns of the source.
        prompt: Jinja template over the columns for the prompt; null takes the prompt column of a known shape.
        completion: Jinja template over the columns for the answer; null takes the shape's own.

    Returns:
        The reader. An optional `system` column becomes the system message of every shape but text.

    Raises:
        DataError: The columns are of no known shape, or a template cannot be parsed.
    """
    if completion is not None:
        return _templated_reader(columns, prompt, completion)
    for column in CONVERSATIONS:
        if column in columns:
            return Reader(column, _present(columns, column, "system"), _conversation_reader(column))
    for asked, answered in PAIRS:
        if asked in columns and answered in columns:
            used = _present(columns, asked, answered, *_context(columns, asked), "system")
            return Reader(f"{asked}/{answered}", used, _pair_reader(asked, answered, _context(columns, asked)))
    if "text" in columns:
        return Reader("text", ("text",), lambda row: Example(text=_text(row, "text")))
    raise DataError(
        f"columns {_listed(columns)} are of no known shape ({KNOWN_SHAPES}): "
        'say what to read with `prompt:` and `completion:` templates, such as prompt: "{{ COLUMN }}"'
    )


def compile_template(source: str, what: str) -> Callable[[Row], str]:
    """Compile a user's Jinja template: sandboxed and strict; null renders as nothing.

    Args:
        source: The template's text.
        what: What the template is called in error messages.

    Returns:
        A function of the variables that gives the rendered text, or raises a DataError that says what is wrong.

    Raises:
        DataError: The template cannot be parsed.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=lambda value: "" if value is None else value, trim_blocks=True, lstrip_blocks=True
    )
    try:
        template = within_limits(what, lambda: environment.from_string(source))
        names = within_limits(what, lambda: meta.find_undeclared_variables(environment.parse(source)))
    except TemplateSyntaxError as error:
        raise DataError(
            f"{what} is not a valid Jinja template: {error.message} (line {error.lineno}): {_shown(source)}"
        ) from error
    except RENDERING_ERRORS as error:
        raise DataError(f"{what} is not a valid Jinja template: {error}: {_shown(source)}") from error
    return _Compiled(source, what, template, frozenset(names))


@dataclass(frozen=True)
class _Compiled:
    """A compiled template, called with its variables; to another process it travels as its text."""

    source: str
    what: str
    template: JinjaTemplate
    names: frozenset[str]

    def __call__(self, variables: Row) -> str:
        try:
            return within_limits(self.what, lambda: self.template.render(variables))
        except RENDERING_ERRORS as error:
            missing = sorted(self.names - set(variables))
            if missing:
                hints = get_close_matches(missing[0], list(variables), n=1)
                hint = f"; did you mean `{hints[0]}`?" if hints else ""
                raise DataError(
                    f"{self.what} {_shown(self.source)} uses `{missing[0]}`, which is not there: found {_listed(variables)}{hint}"
                ) from error
            raise DataError(f"{self.what} {_shown(self.source)} cannot be rendered: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return compile_template, (self.source, self.what)


def _templated_reader(columns: Sequence[str], prompt: str | None, completion: str) -> Reader:
    """Read with the source's own templates; a missing prompt template is the prompt column of a known shape."""
    answer = compile_template(completion, "the completion template")
    if prompt is None:
        asked = next((asked for asked, _ in PAIRS if asked in columns), None)
        if asked is None:
            prompts = ", ".join(dict.fromkeys(asked for asked, _ in PAIRS))
            raise DataError(
                f"a completion template alone needs one of the prompt columns {prompts}, found {_listed(columns)}: "
                "add a `prompt:` template"
            )
        context = _context(columns, asked)

        def read(row: Row) -> Example:
            return _pair(row, _prompt_messages(row, asked), (Message("assistant", answer(row)),), context)

        return Reader(f"{asked}/completion template", tuple(columns), read)
    question = compile_template(prompt, "the prompt template")

    def read_both(row: Row) -> Example:
        return Example((Message("user", question(row)), Message("assistant", answer(row))))

    return Reader("prompt/completion templates", tuple(columns), read_both)


def _pair_reader(asked: str, answered: str, context: tuple[str, ...]) -> Callable[[Row], Example]:
    """Read a prompt and an answer column; both may hold message lists instead of text (TRL's conversational form)."""

    def read(row: Row) -> Example:
        answer = row.get(answered)
        answers = _messages(answer, answered) if isinstance(answer, list) else None
        return _pair(row, _prompt_messages(row, asked), answers or (Message("assistant", _text(row, answered)),), context)

    return read


def _pair(row: Row, asked: tuple[Message, ...], answers: tuple[Message, ...], context: tuple[str, ...]) -> Example:
    given = _text(row, context[0]) if context else ""
    return Example(_answered((*_system(row), *asked, *answers)), input=given)


def _conversation_reader(column: str) -> Callable[[Row], Example]:
    def read(row: Row) -> Example:
        messages = _messages(row.get(column), column)
        system = () if messages[0].role == "system" else _system(row)
        return Example(_answered((*system, *messages)))

    return read


def _answered(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Cut what follows the last answer: nothing in it can be learnt. Without any answer everything is kept."""
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    return messages[: last + 1]


def _prompt_messages(row: Row, column: str) -> tuple[Message, ...]:
    value = row.get(column)
    return _messages(value, column) if isinstance(value, list) else (Message("user", _text(row, column)),)


def _system(row: Row) -> tuple[Message, ...]:
    text = _text(row, "system")
    return (Message("system", text),) if text else ()


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    """Read a list of role/content or from/value entries."""
    if not isinstance(value, list) or not value:
        raise DataError(f"column `{column}` must be a list of messages, found {_shown(value)}")
    return tuple(_message(entry, f"`{column}`[{number}]") for number, entry in enumerate(value))


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where} must be a message with role and content (or from and value), found {_shown(entry)}")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where} has the role {_shown(role)}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} must have a text as its content, found {_shown(content)}")
    return Message(ROLES[role], content)


def _text(row: Row, column: str) -> str:
    """Return a column's value as text; null is empty, a number is written out."""
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(
        f"column `{column}` must be text, found {_shown(value)}: "
        f'choose what to read with a template, such as "{{{{ {column}[0] }}}}"'
    )


def _context(columns: Sequence[str], asked: str) -> tuple[str, ...]:
    return _present(columns, *CONTEXT_COLUMNS)[:1] if asked == "instruction" else ()


def _present(columns: Sequence[str], *wanted: str) -> tuple[str, ...]:
    return tuple(column for column in wanted if column in columns)


def _listed(columns: Sequence[str] | Row) -> str:
    return ", ".join(f"`{column}`" for column in columns) or "none"


def _shown(value: Any) -> str:
    """Return a short one-line form of a value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
