"""`abba generate` and `abba chat`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from abba_cli.commands.options import Dtype, ForceOption, QuantizationName
from abba_cli.errors import DataError
from abba_cli.terminal import interruptible, open_console, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from abba_cli.formats import Message
    from abba_cli.generating import Answer, Sampling
    from abba_cli.speakers import Source, Speaker


AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="A run, an adapter directory, a folder of runs, or a hub id.",
        show_default="the newest finished run under out/",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id or directory of a base or merged model, in place of --adapter.")
]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="The base, in place of the recorded one; with --model, what --compare compares with.")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the base or of --model.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Data type of the weights.", show_default="the checkpoint's or the training's")
]
QuantizationOption = Annotated[QuantizationName, typer.Option("--quantization", help="Quantise the weights while loading.")]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="none, alpaca, chat, or a Jinja file.",
        show_default="the run's, else the tokenizer's chat template, else none",
    ),
]
SystemOption = Annotated[str | None, typer.Option("--system", help="A system message before the conversation.")]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time; higher values draw more freely.")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.01, max=1.0, help="Draw from the likeliest tokens of this probability together.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the draws.", show_default="another each time")]
CompareOption = Annotated[bool, typer.Option("--compare", help="Show the base's answer beside it.")]


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from standard input, as does a pipe.", show_default=False)
    ] = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = QuantizationName.NONE,
    template: TemplateOption = None,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    compare: CompareOption = False,
) -> None:
    """Answer one prompt. Into a pipe goes the answer's text and nothing else."""
    text = _prompt(prompt)
    _check(adapter, model, base, temperature, top_p, compare)
    quiet_libraries()
    from abba_cli.formats import Message
    from abba_cli.generating import Sampling
    from abba_cli.speakers import Source
    from abba_cli.ui.chat import show_speed

    source = Source(adapter, model, base, revision, force, None if dtype is None else dtype.value, quantization.value, template)
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    asked = [*([Message("system", system)] if system else []), Message("user", text)]
    console, notes = open_console(), open_console(stderr=True)
    with interruptible("the answer is not complete"):
        speakers = _load(source, compare, notes)
        answers = _answer(speakers, [asked for _ in speakers], sampling, console)
    show_speed(notes, [(speaker.label, one) for speaker, one in zip(speakers, answers, strict=True)])


def chat(
    adapter: AdapterOption = None,
    model: ModelOption = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = QuantizationName.NONE,
    template: TemplateOption = None,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    compare: CompareOption = False,
) -> None:
    """Talk in the terminal. Ctrl-C stops an answer; Ctrl-C at the prompt, Ctrl-D or /exit ends, /reset starts over."""
    _check(adapter, model, base, temperature, top_p, compare)
    quiet_libraries()
    from abba_cli.formats import Message
    from abba_cli.generating import Sampling
    from abba_cli.speakers import Source
    from abba_cli.ui.chat import show_note

    source = Source(adapter, model, base, revision, force, None if dtype is None else dtype.value, quantization.value, template)
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    console, notes = open_console(), open_console(stderr=True)
    with interruptible("nothing was said"):
        speakers = _load(source, compare, notes)
    if console.is_terminal:
        show_note(
            notes, f"{speakers[-1].label}, template {speakers[-1].template.name}. /reset starts over, /exit or Ctrl-D ends."
        )
    try:
        _converse(speakers, [Message("system", system)] if system else [], sampling, console, notes)
    except KeyboardInterrupt:
        show_note(notes, "")
        raise typer.Exit(130) from None


def _converse(
    speakers: "Sequence[Speaker]", start: "Sequence[Message]", sampling: "Sampling", console: "Console", notes: "Console"
) -> None:
    """Take lines and answer them until the input ends; every speaker has a conversation of its own."""
    from abba_cli.formats import Message
    from abba_cli.generating import within_positions
    from abba_cli.ui.chat import read_line, show_note, show_speed

    histories = [list(start) for _ in speakers]
    while (line := read_line(console)) is not None:
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            histories = [list(start) for _ in speakers]
            show_note(notes, "starting over")
        elif command.startswith("/") and command[1:].isalpha():
            show_note(notes, f"there is no {command}; there are /reset and /exit")
        elif command:
            asked = [[*history, Message("user", line)] for history in histories]
            kept = [within_positions(speaker, one, sampling) for speaker, one in zip(speakers, asked, strict=True)]
            if dropped := max(len(a) - len(b) for a, b in zip(asked, kept, strict=True)):
                show_note(
                    notes, f"the conversation has outgrown the model's positions; its oldest {dropped} messages were dropped"
                )
            try:
                answers = _answer(speakers, kept, sampling, console, stoppable=True)
            except DataError as error:
                show_note(notes, f"{error}")
                continue
            # One that was stopped at once has said nothing; templates do not know empty answers.
            histories = [
                [*one, Message("assistant", said.text)] if said.text.strip() else one[:-1]
                for one, said in zip(kept, answers, strict=True)
            ]
            if not all(said.complete for said in answers):
                show_note(notes, "stopped")
            show_speed(notes, [(speaker.label, said) for speaker, said in zip(speakers, answers, strict=True)])
    if console.is_terminal:
        show_note(notes, "")  # the shell's prompt gets a line of its own


def _answer(
    speakers: "Sequence[Speaker]",
    conversations: "Sequence[Sequence[Message]]",
    sampling: "Sampling",
    console: "Console",
    stoppable: bool = False,
) -> "list[Answer]":
    """Let each speaker answer its conversation, and draw that; if `stoppable`, Ctrl-C ends an answer where it is."""
    from abba_cli.generating import Answer, answer
    from abba_cli.ui.chat import SideBySide, Streamed, fits_side_by_side, show_label

    several = len(speakers) > 1
    columns = SideBySide(console, [one.label for one in speakers]) if several and fits_side_by_side(console) else None
    answers = []
    with columns or nullcontext():
        for index, (speaker, conversation) in enumerate(zip(speakers, conversations, strict=True)):
            if several and not columns:
                show_label(console, speaker.label, first=index == 0)
            stream = Streamed(console)
            draw = partial(columns.add, index) if columns else stream
            heard: list[str] = []

            def hear(text: str, draw: "Callable[[str], None]" = draw, heard: list[str] = heard) -> None:
                heard.append(text)
                draw(text)

            try:
                answers.append(answer(speaker, conversation, sampling, hear))
            except KeyboardInterrupt:
                if not stoppable:
                    raise
                answers.append(Answer("".join(heard), 0, 0.0, complete=False))
            if not columns:
                stream.close()
    return answers


def _load(source: "Source", compare: bool, notes: "Console") -> "list[Speaker]":
    """Load, with a spinner on a terminal; says which run was taken where none was named."""
    from abba_cli.speakers import load_for_generation

    with notes.status("Loading") if notes.is_terminal else nullcontext():
        speakers = load_for_generation(source, compare)
    if source.model is None and speakers[-1].label.rstrip("/") != (source.adapter or "").rstrip("/"):
        typer.echo(f"abba: this is {speakers[-1].label}, the newest finished run there", err=True)
    return speakers


def _prompt(given: str | None) -> str:
    """The prompt from the argument or standard input.

    Raises:
        DataError: It is empty.
    """
    if given is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or - to read it from standard input", param_hint="PROMPT")
    text = sys.stdin.read().rstrip("\n") if given in (None, "-") else str(given)
    if not text.strip():
        raise DataError("the prompt is empty; give it as an argument, or on standard input with -")
    return text


def _check(adapter: str | None, model: str | None, base: str | None, temperature: float, top_p: float, compare: bool) -> None:
    """Refuse options that contradict each other."""
    if adapter is not None and model is not None:
        raise typer.BadParameter("name one of --adapter and --model, not both")
    if model is not None and base is not None and not compare:
        raise typer.BadParameter("--base goes with an adapter, or with --model and --compare")
    if top_p < 1.0 and temperature == 0.0:
        raise typer.BadParameter("--top-p needs a --temperature above 0: at 0 nothing is drawn")
