"""The `abba` command. Heavy rooms are imported inside each command, so that `abba --help` is instant."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from abba_cli import __version__
from abba_cli.errors import AbbaError, TrainingInterrupted

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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be given several times."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check recipe, data and adapter and estimate memory, without reading the weights."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over in an output directory that holds a run; that run is lost.")
    ] = False,
) -> None:
    """Train an adapter from a recipe, or go on with the run in its output directory."""
    from abba_cli.recipe_file import load_recipe

    read = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    from rich.console import Console

    from abba_cli import training
    from abba_cli.ui import RunDisplay

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width; 80 would fold the tables
    try:
        with RunDisplay(console, plan_only=dry_run) as display:
            if dry_run:
                training.prepare(read, restart=restart, listen=display)
            else:
                training.train(read, restart=restart, listen=display)
    except KeyboardInterrupt:
        # Before or after the steps, where there is nothing to save that is not saved already.
        typer.echo("abba: interrupted; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


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
    except TrainingInterrupted as error:
        typer.echo(str(error), err=True)
        sys.exit(128 + error.signal_number)
    except AbbaError as error:
        typer.echo(f"abba: {error}", err=True)
        sys.exit(1)


def _quiet_libraries() -> None:
    """Keep libraries from printing over the display; must run before they are imported."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Notices to developers, such as peft 0.21.2 asking transformers 5.23 for a name that version 6 will drop.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # bitsandbytes 0.50 tells everyone with a CPU that an optional kernel package is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
