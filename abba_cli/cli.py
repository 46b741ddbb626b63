"""The `abba` command. Heavy rooms are imported inside each command, so that `abba --help` is instant."""

import os
import sys
from typing import Annotated

import typer

from abba_cli import __version__
from abba_cli.commands.compare import compare
from abba_cli.commands.doctor import doctor
from abba_cli.commands.evaluate import evaluate
from abba_cli.commands.export import export
from abba_cli.commands.generate import chat, generate
from abba_cli.commands.importing import import_
from abba_cli.commands.merge import merge
from abba_cli.commands.push import push
from abba_cli.commands.reconstruct import reconstruct
from abba_cli.commands.sweep import sweep
from abba_cli.commands.train import train
from abba_cli.errors import AbbaError, LostContact, TrainingInterrupted
from abba_cli.launching import LAUNCHED, keep_launcher_silent

app = typer.Typer(
    name="abba",
    help="Fine-tune language models with ABBA adapters: dW = s (B1 A1) * (B2 A2).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"abba {__version__}")
        raise typer.Exit


@app.callback()
def _abba(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


app.command()(train)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(merge)
app.command()(export)
app.command("import")(import_)
app.command()(push)
app.command()(sweep)
app.command()(reconstruct)
app.command()(doctor)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from abba_cli.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def main() -> None:
    """Run the command line; a user's error becomes one message and exit code 1."""
    try:
        app(prog_name="abba")
    except AbbaError as error:
        if isinstance(error, TrainingInterrupted):
            keep_launcher_silent()
        number = int(os.environ.get("RANK", "0"))
        if error.shared and number > 0:
            sys.exit(0)  # the main process says it, and fails; had this one failed first, it might be ended before it can
        if isinstance(error, LostContact) and LAUNCHED in os.environ:
            sys.exit(1)  # the launcher says which process it was
        if isinstance(error, TrainingInterrupted):
            typer.echo(str(error), err=True)
            sys.exit(128 + error.signal_number)
        typer.echo(f"abba: {f'process {number}: ' if number else ''}{error}", err=True)
        sys.exit(1)
    except ImportError as error:
        if not _was_interrupted(error):
            raise
        typer.echo("abba: interrupted while it was starting; nothing was done", err=True)
        sys.exit(130)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error stands for Ctrl-C: transformers makes one of its own of whatever comes while it imports a module."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
