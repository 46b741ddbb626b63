"""`abba train`."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from abba_cli.commands.options import PushOption
from abba_cli.launching import Launcher, is_launched, launch, take_place_from_slurm, wanted_layout
from abba_cli.terminal import interruptible, open_console, quiet_libraries


def _budget(text: str) -> int:
    from abba_cli.forecast.budget import parse_budget

    try:
        return parse_budget(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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
    fit: Annotated[
        int | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            parser=_budget,
            help="A dry run that finds the largest batch for this much memory on each device, such as 24GB, and what helps "
            "where the recipe takes more.",
            show_default=False,
        ),
    ] = None,
    push: PushOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over in an output directory that holds a run; that run is lost.")
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Processes on this machine; by default one for each GPU that is visible, and one without a GPU.",
            show_default=False,
        ),
    ] = None,
    num_machines: Annotated[int, typer.Option("--num-machines", metavar="M", min=1, help="Machines that train together.")] = 1,
    machine_rank: Annotated[int, typer.Option("--machine-rank", metavar="K", help="This machine's number, from 0.")] = 0,
    main_address: Annotated[
        str | None, typer.Option("--main-address", metavar="HOST:PORT", help="Where machine 0 is reached.", show_default=False)
    ] = None,
    launcher: Annotated[
        Launcher,
        typer.Option("--launcher", help="none: start no processes, since torchrun, accelerate or SLURM has done it."),
    ] = Launcher.auto,
) -> None:
    """Train an adapter from a recipe, on every visible GPU. A run that is in its output directory already is gone on with."""
    from abba_cli.recipe_file import load_recipe

    read = load_recipe(recipe, overrides or [])
    quiet_libraries()
    if launcher is Launcher.none:
        take_place_from_slurm()
    layout = wanted_layout(num_processes, num_machines, machine_rank, main_address)
    planning = dry_run or fit is not None
    if layout.count > 1 and launcher is Launcher.auto and not is_launched() and not planning:
        code = launch(sys.argv[1:], layout)
        if code:
            raise typer.Exit(code)
        return
    from abba_cli import training
    from abba_cli.memory import reuse_freed_memory
    from abba_cli.preparation import prepare
    from abba_cli.processes import join_crew
    from abba_cli.pushing import check_push
    from abba_cli.pushing import push as upload
    from abba_cli.ui.steps import StepsDisplay, show_pushed
    from abba_cli.ui.training import RunDisplay

    if push is not None:
        check_push(push)
    # A signal during the steps is handled there, with a checkpoint; before and after there is nothing to save.
    advice = "run the same command again to go on"
    console = open_console()
    if planning:
        with interruptible(advice), RunDisplay(console, plan_only=True) as display:
            plan = prepare(read, restart=restart, listen=display, budget=fit, processes=layout.count).plan
        if plan.fit is not None and plan.fit.largest is None:
            raise typer.Exit(1)
        return
    reuse_freed_memory()
    crew = join_crew()
    if not crew.is_main:
        with contextlib.suppress(KeyboardInterrupt):  # the main process answers it
            training.train(read, restart=restart)
            crew.leave()
        return
    with interruptible(advice), RunDisplay(console) as display:
        run = training.train(read, restart=restart, listen=display)
    crew.leave()
    if push is not None:
        with interruptible(f"{run.path} is complete, but not uploaded"), StepsDisplay(console) as steps:
            url = upload(run.path, push, listen=steps)
        show_pushed(console, url)
