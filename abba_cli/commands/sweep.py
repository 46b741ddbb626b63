"""`abba sweep`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from abba_cli.terminal import interruptible, open_console, quiet_libraries


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of every run's recipe; may be given several times."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="What {data_dir} in the sweep stands for.", show_default="the sweep's")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the runs and the report.", show_default="the sweep's")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time; the GPUs, or the cores, are shared out to them.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and which of them are done; run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report of what is done; run nothing.")] = False,
) -> None:
    """Train and score every variant of a recipe, and report which is best. What is done already is not done again."""
    quiet_libraries()
    from abba_cli.sweeping.planning import load_sweep
    from abba_cli.sweeping.running import read_all, run_sweep
    from abba_cli.ui.progress import timed_bar
    from abba_cli.ui.sweep import draw_progress, show_plan, show_report, write_report

    read = load_sweep(file, overrides or [], data_dir, output)
    console = open_console()
    if dry_run:
        show_plan(console, read)
        return
    if report:
        records, left = read_all(read)
    else:
        with interruptible("the same command goes on from here"), timed_bar(console) as bar:
            records, left = run_sweep(read, parallel, partial(draw_progress, bar))
    show_report(console, read, write_report(read, records, left))
    if any(record.status == "failed" for record in records):
        raise typer.Exit(1)
