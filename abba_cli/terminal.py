"""What surrounds a command on a terminal: its console, and libraries that keep quiet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console


def open_console(stderr: bool = False) -> "Console":
    """The console that a command draws on."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = 120  # a log file has no width; 80 would fold the tables
    return console


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Answer Ctrl-C with what it left behind, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"abba: interrupted; {advice}", err=True)
        raise typer.Exit(130) from None


def quiet_libraries() -> None:
    """Keep libraries from printing over the display; must run before they are imported."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every retry
    # Notices to developers, such as peft 0.21.2 asking transformers 5.23 for a name that version 6 will drop.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # bitsandbytes 0.50 tells everyone with a CPU that an optional kernel package is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
