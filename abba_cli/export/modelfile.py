"""An Ollama Modelfile: the prompt template that training used, in Ollama's language, with its default system message and stops.

Ollama renders one turn at a time from `.System`, `.Prompt` and `.Response`, or, where a template asks for `.Messages`, the whole
conversation: `Execute` in https://github.com/ollama/ollama/blob/aac17d5f158d5ba6e3b22dae9752f19d6f002cdc/template/template.go
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import DataError
from abba_cli.formats import Example, Message
from abba_cli.prompts import Template, leading_ids

MODELFILE = "Modelfile"

# Texts that no template has of its own.
_S, _U, _A, _V = "\u2042system\u2042", "\u2042first\u2042", "\u2042answer\u2042", "\u2042second\u2042"


@dataclass(frozen=True)
class ModelfileReport:
    """What `write_modelfile` has written.

    Args:
        file: The Modelfile.
        untemplated: Why it has no TEMPLATE, or None where it has one.
        system: The template's own system message, or None.
        takes_system: Whether a system message reaches the model.
        stops: Texts of the tokens that end an answer.
    """

    file: Path
    untemplated: str | None
    system: str | None
    takes_system: bool
    stops: tuple[str, ...]


@dataclass(frozen=True)
class _Pieces:
    """The text around what is said.

    Args:
        start: Before the first user's message, where there is no system message.
        system: Before and after the system message, up to the first user's message; None if the template takes none.
        user: Before a later user's message.
        ask: Between the last user's message and the answer to be generated.
        past: Between an earlier user's message and its answer.
        end: After an answer.
    """

    start: str
    system: tuple[str, str] | None
    user: str
    ask: str
    past: str
    end: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for an answer to the last of these messages."""
        text = ""
        for index, message in enumerate(messages):
            if message.role == "system":
                before, after = self.system or ("", self.start)
                text += before + message.content * bool(self.system) + after
            elif message.role == "user":
                follows_system = index == 1 and messages[0].role == "system"
                opening = "" if follows_system else self.user if index else self.start
                text += opening + message.content + (self.ask if index == len(messages) - 1 else self.past)
            else:
                text += message.content + self.end
        return text


class _Irregular(Exception):
    """A template that cannot be put together from pieces; the text says why."""


def write_modelfile(folder: Path, gguf_name: str, template: Template, adds_bos: bool | None = None) -> ModelfileReport:
    """Write a Modelfile beside a GGUF: `ollama create NAME -f Modelfile`.

    The template is found out by rendering made-up conversations, and written only if it then renders other ones exactly as our
    template does.

    Args:
        folder: Where the GGUF is.
        gguf_name: Its file name.
        template: The prompt template of the training.
        adds_bos: Whether the GGUF makes llama.cpp put a beginning-of-sequence token before the prompt, from `gguf.adds_bos`; None
            for what the tokenizer does.

    Raises:
        RunError: The file cannot be written.
    """
    stops = tuple(dict.fromkeys(str(template.tokenizer.decode([token])) for token in template.stop_token_ids))
    lines = [f"FROM ./{gguf_name}"]
    pieces, system, untemplated = None, None, None
    try:
        pieces = _pieces(template)
        _verify(pieces, template)
        system = _default_system(pieces)
        written = _go_template(_with_bos(pieces, template, adds_bos), system)
        if '"""' in written + (system or ""):
            raise _Irregular('it contains """, which a Modelfile cannot')
        lines.append(f'TEMPLATE """{written}"""')
        lines += [f'SYSTEM """{system}"""'] if system is not None else []
    except _Irregular as error:
        pieces, system = None, None
        untemplated = f"the prompt template {template.name} cannot be put into Ollama's words: {error}"
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    file = folder / MODELFILE
    with disk_errors(file):
        write_atomically(file, "\n".join(lines) + "\n")
    return ModelfileReport(file, untemplated, system, pieces is not None and pieces.system is not None, stops)


def _prompt(template: Template, *messages: Message) -> str:
    return template.prompt_text(Example(messages))


def _user(text: str) -> Message:
    return Message("user", text)


def _assistant(text: str) -> Message:
    return Message("assistant", text)


def _pieces(template: Template) -> _Pieces:
    """Find the pieces by rendering."""
    try:
        start, ask = _around(_prompt(template, _user(_U)), _U)
        opening, past, between, ask_again = _around(_prompt(template, _user(_U), _assistant(_A), _user(_V)), _U, _A, _V)
        finished = template.segments(Example((_user(_U), _assistant(_A))))[-1].text
    except DataError as error:
        raise _Irregular(str(error)) from None
    if (opening, ask_again) != (start, ask):
        raise _Irregular("a turn is written in another way when others follow or precede it")
    if between.endswith(start):
        user = start
    else:
        # A first turn of its own kind: an answer ends with what has to be generated, and the white space after it.
        end = re.match(re.escape(finished.partition(_A)[2].rstrip()) + r"\s*", between)
        if not end:
            raise _Irregular("an earlier answer ends in another way than the last")
        user = between[end.end() :]
    pieces = _Pieces(start, None, user, ask, past, between.removesuffix(user))
    try:
        system_text = _prompt(template, Message("system", _S), _user(_U))
    except DataError:
        return pieces
    if _S not in system_text:
        return pieces
    before, after, ask_after = _around(system_text, _S, _U)
    if ask_after != ask:
        raise _Irregular("a turn is written in another way after a system message")
    return replace(pieces, system=(before, after))


def _around(text: str, *contents: str) -> tuple[str, ...]:
    """The text before, between and after contents that must appear once each and in this order."""
    parts = re.split("|".join(map(re.escape, contents)), text)
    if re.findall("|".join(map(re.escape, contents)), text) != list(contents):
        raise _Irregular("what is said is rewritten, repeated or moved")
    return tuple(parts)


def _verify(pieces: _Pieces, template: Template) -> None:
    """Hold the pieces against the template in conversations other than those they came from."""
    said = [_user("Wie geht's?\n\nSay it in 2 words."), _assistant("Very well: {{ thanks }}"), _user('"And" <now>?')]
    said += [_assistant("Also\n- well"), _user("1 + 1 = ?")]
    system = Message("system", "You're terse.\nBe kind.")
    for length in (1, 3, 5):
        conversations = [said[:length], [system, *said[:length]]] if pieces.system else [said[:length]]
        for messages in conversations:
            try:
                expected = _prompt(template, *messages)
            except DataError as error:
                raise _Irregular(str(error)) from None
            if pieces.render(messages) != expected:
                raise _Irregular(f"a conversation of {', '.join(one.role for one in messages)} comes out differently")


def _default_system(pieces: _Pieces) -> str | None:
    """The message D with which the template begins as if it were given a system message D."""
    if pieces.system is None or pieces.start == pieces.user:
        return None
    before, after = pieces.system
    middle = pieces.start.removeprefix(before).removesuffix(after)
    return middle if middle and before + middle + after == pieces.start else None


def _with_bos(pieces: _Pieces, template: Template, adds_bos: bool | None) -> _Pieces:
    """See to it that the beginning-of-sequence token comes once, whoever writes it."""
    bos = str(template.tokenizer.bos_token or "")
    ours = bool(leading_ids(template.tokenizer))
    adds = ours if adds_bos is None else adds_bos
    if adds:
        system = (pieces.system[0].removeprefix(bos), pieces.system[1]) if pieces.system else None
        return replace(pieces, start=pieces.start.removeprefix(bos), system=system)
    if ours:
        system = (bos + pieces.system[0], pieces.system[1]) if pieces.system else None
        return replace(pieces, start=bos + pieces.start, system=system)
    return pieces


def _go_template(pieces: _Pieces, system: str | None) -> str:
    """The pieces in Go's template language: turn by turn where every turn is alike, else the whole conversation."""
    start, user, ask, past, end = map(_literal, (pieces.start, pieces.user, pieces.ask, pieces.past, pieces.end))
    before, after = map(_literal, pieces.system or ("", ""))
    if pieces.ask == pieces.past and (pieces.start == pieces.user or system is not None):
        opening = (
            f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{user}{{{{ end }}}}" if pieces.system else user
        )
        return f"{opening}{{{{ .Prompt }}}}{ask}{{{{ .Response }}}}{end}"
    # Messages of one role in a row come as one, so that the second is a user's only after a system message.
    if pieces.system:
        said = f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}{{{{ else if eq .Role "user" }}}}'
        said += f"{{{{ if eq $i 0 }}}}{start}{{{{ else if gt $i 1 }}}}{user}{{{{ end }}}}"
    else:
        said = f'{{{{ if eq .Role "user" }}}}{{{{ if le $i 1 }}}}{start}{{{{ else }}}}{user}{{{{ end }}}}'
    last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
    answered = ask if ask == past else f"{last}{ask}{{{{ else }}}}{past}{{{{ end }}}}"
    said += f'{{{{ .Content }}}}{answered}{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{end}{{{{ end }}}}'
    return f"{{{{ range $i, $_ := .Messages }}}}{said}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text that Go's templates write as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
