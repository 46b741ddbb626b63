"""`abba import`."""

from pathlib import Path
from typing import Annotated

import typer

from abba_cli.commands.options import OverwriteOption
from abba_cli.terminal import interruptible, open_console, quiet_libraries


def import_(
    path: Annotated[
        Path,
        typer.Argument(help="Folder or file of the authors' ABBA adapter, or of a LoHa (PEFT, LyCORIS).", show_default=False),
    ],
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="The model it was trained on: hub id or directory.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the adapter goes.", show_default=False)],
    overwrite: OverwriteOption = False,
) -> None:
    """Make an ABBA adapter of another program's. It is the same update, in a directory of ours."""
    quiet_libraries()
    from abba_cli.bases import find_base
    from abba_cli.foreign import read_foreign
    from abba_cli.importing import write_imported
    from abba_cli.outputs import check_output, place
    from abba_cli.recipe import ModelSection

    with interruptible("nothing was written"):
        output = place(output)
        check_output(output, overwrite, command="import", sources=[path])
        foreign = read_foreign(path)
        adapter = write_imported(foreign, find_base(ModelSection(name=base)), output, overwrite)
    ranks = sorted({(layer.r1, layer.r2) for layer in adapter.layers.values()})
    scales = sorted({layer.s for layer in adapter.layers.values()})
    console = open_console()
    console.print(
        f"found      {foreign.format}: {len(adapter.layers)} layers, {_ranks(ranks)}, {_scales(scales)}", highlight=False
    )
    console.print(f"written    {output}", highlight=False, soft_wrap=True)
    console.print(f"next       abba merge --adapter {output}", highlight=False, soft_wrap=True)


def _ranks(ranks: list[tuple[int, int]]) -> str:
    first = f"r1 = {ranks[0][0]}, r2 = {ranks[0][1]}"
    return first if len(ranks) == 1 else f"{first} to r1 = {ranks[-1][0]}, r2 = {ranks[-1][1]}"


def _scales(scales: list[float]) -> str:
    return f"s = {scales[0]:.4g}" if f"{scales[0]:.4g}" == f"{scales[-1]:.4g}" else f"s = {scales[0]:.4g} to {scales[-1]:.4g}"
