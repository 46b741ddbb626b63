"""`abba compare`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from abba_cli.terminal import interruptible, open_console, quiet_libraries


def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Evaluated runs, outputs of `abba eval`, or results.json files.", metavar="PATH...", show_default=False
        ),
    ],
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table to this .md file.")] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw scores and 95% intervals to this .png.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that `abba compare` has written.")] = False,
) -> None:
    """Put the results of several evaluations side by side, with the best of each task marked."""
    quiet_libraries()
    from abba_cli.disk import disk_errors, write_atomically
    from abba_cli.evaluation.reporting.comparing import compare as run
    from abba_cli.evaluation.reporting.side_by_side import comparison_markdown, comparison_table

    markdown = None if markdown is None else _check(markdown, ".md", overwrite)
    png = None if png is None else _check(png, ".png", overwrite)
    console = open_console()
    with interruptible("what was not yet written is missing"):
        comparison = run(sources)
        console.print(comparison_table(comparison, console.width))
        if markdown is not None:
            with disk_errors(markdown):
                write_atomically(markdown, comparison_markdown(comparison))
        if png is not None:
            from abba_cli.evaluation.reporting.chart import comparison_png

            comparison_png(comparison, png)
    for file in filter(None, (markdown, png)):
        console.print(f"written {file}", highlight=False, markup=False, soft_wrap=True)


def _check(file: Path, suffix: str, overwrite: bool) -> Path:
    """Make sure that a file may be written, before anything is.

    Raises:
        RunError: Its name ends otherwise, it exists and may not be replaced, or its folder cannot be written.
    """
    from abba_cli.disk import disk_errors
    from abba_cli.errors import RunError
    from abba_cli.evaluation.reporting.side_by_side import MADE_BY

    file = file.expanduser()
    if file.suffix.lower() != suffix:
        raise RunError(f"cannot write {file}: expected a name that ends in {suffix}")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
            raise RunError(f"cannot write to {file}; choose another file")
        if file.exists() and not overwrite:
            raise RunError(f"{file} exists; choose another, or give --overwrite to replace it")
        if file.exists() and MADE_BY.encode() not in file.read_bytes()[:4096]:
            raise RunError(f"{file} was not written by `{MADE_BY}`, so it is not replaced; choose another")
    return file
