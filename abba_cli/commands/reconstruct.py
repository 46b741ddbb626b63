"""`abba reconstruct`."""

import enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from abba_cli.terminal import interruptible, open_console, quiet_libraries


class SolverName(enum.StrEnum):
    """What `--solver` takes."""

    als = "als"
    adam = "adam"


def read_ranks(text: str) -> list[int]:
    """Ranks from `8,16,32`, ascending."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise typer.BadParameter(f"{text!r} is no list of ranks; expected numbers from 2 on, such as 8,16", param_hint="--ranks")
    return sorted({int(word) for word in words})


def read_methods(text: str) -> list[str]:
    """Methods from `lora,abba`."""
    words = [word.strip() for word in text.split(",")]
    if not set(words) <= {"lora", "abba", "loha"}:
        raise typer.BadParameter(f"{text!r} is no list of methods; expected some of lora,abba,loha", param_hint="--methods")
    return list(dict.fromkeys(words))


def reconstruct(
    matrices: Annotated[
        list[str] | None,
        typer.Argument(
            help="random, orthogonal, sparse, low-rank, block-diagonal, an image file, or CHECKPOINT:TENSOR. "
            "With --base and --tuned, or --adapter: types (q_proj) or names of layers, with wildcards; all by default.",
            metavar="MATRIX",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the table, the plot and the report. Fits that it has are not made again.")
    ] = Path("out/reconstruct"),
    ranks: Annotated[str, typer.Option(help="LoRA's ranks; the others get as many parameters.")] = "8,16,32,64",
    methods: Annotated[str, typer.Option(help="Some of lora, abba, loha.")] = "lora,abba,loha",
    size: Annotated[int, typer.Option(help="Sides of a made matrix; longest side of an image.", min=8, max=16384)] = 256,
    restarts: Annotated[int, typer.Option(help="Starts of ABBA and of LoHa; the best one counts.", min=1, max=1000)] = 4,
    solver: Annotated[SolverName, typer.Option(help="Alternating least squares, or Adam.")] = SolverName.als,
    sweeps: Annotated[int, typer.Option(help="The most that a fit may take; Adam makes 4 steps for each.", min=1)] = 500,
    base: Annotated[str | None, typer.Option(help="With --tuned: the model before, as hub id, folder or package:NAME.")] = None,
    tuned: Annotated[str | None, typer.Option(help="The model after; what is approximated is tuned - base.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="In place of both: a run or an adapter, whose updates are approximated, such as one of `method: full`."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the matrices and the starts.", min=0, max=2**31)] = 0,
) -> None:
    """Approximate matrices by LoRA, ABBA and LoHa of equal numbers of parameters: error against rank, with a plot."""
    chosen_ranks, chosen_methods = read_ranks(ranks), read_methods(methods)
    if (base is None) != (tuned is None):
        raise typer.BadParameter("--base and --tuned belong together: what is approximated is their difference")
    if adapter is not None and base is not None:
        raise typer.BadParameter("--adapter has the updates, and takes no --base and --tuned")
    if not matrices and base is None and adapter is None:
        raise typer.BadParameter(
            "name a matrix such as random, an image or CHECKPOINT:TENSOR, or give --base and --tuned, or --adapter"
        )
    quiet_libraries()
    from abba_cli.disk import disk_errors, write_atomically
    from abba_cli.reconstruction.chart import draw
    from abba_cli.reconstruction.differences import find_differences, find_updates
    from abba_cli.reconstruction.experiment import Plan
    from abba_cli.reconstruction.experiment import reconstruct as run
    from abba_cli.reconstruction.matrices import find_matrix
    from abba_cli.reconstruction.records import CSV
    from abba_cli.reconstruction.reporting import markdown, notes, summarise
    from abba_cli.ui.progress import timed_bar
    from abba_cli.ui.reconstruction import draw_progress, show_reconstruction

    output = output.expanduser()
    console = open_console()
    plan = Plan(chosen_ranks, chosen_methods, solver.value, restarts, seed, sweeps)  # type: ignore[arg-type]
    with (
        interruptible(f"the same command goes on after the last fit in {output / CSV}"),
        timed_bar(console) as bar,
    ):
        if base is not None and tuned is not None:
            targets = find_differences(base, tuned, matrices or [])
        elif adapter is not None:
            targets = find_updates(adapter, matrices or [])
        else:
            targets = [find_matrix(text, size, seed) for text in dict.fromkeys(matrices or [])]
        summary = summarise(run(targets, plan, output, partial(draw_progress, bar)))
        draw(summary, output / "reconstruction.png")
        with disk_errors(output):
            write_atomically(output / "reconstruction.md", markdown(summary, plan.solver, restarts))
    show_reconstruction(
        console, summary, notes(summary, plan.solver, restarts), output, [CSV, "reconstruction.md", "reconstruction.png"]
    )
