"""`abba merge`."""

import enum
import re
from pathlib import Path
from typing import Annotated

import typer

from abba_cli.commands.options import BaseOption, Dtype, ForceOption, OverwriteOption, PushOption, RevisionOption
from abba_cli.terminal import interruptible, open_console, quiet_libraries


class BasePrecision(enum.StrEnum):
    """Which base a merge starts from."""

    original = "original"
    dequantized = "dequantized"


def read_size(text: str) -> int:
    """Bytes from `5GB`, `500 MB` or a bare number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)b?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is no size; expected something like 5GB or 500MB")
    size = int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2].lower()])
    if size < 10**6:
        raise typer.BadParameter(f"{text!r} is less than 1 MB; expected something like 5GB or 500MB")
    return size


def merge(
    adapter: Annotated[
        list[str],
        typer.Option(
            help="A run or adapter directory, a folder of runs (its newest finished run), or a hub id; several may be given.",
            show_default=False,
        ),
    ],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each adapter's update, one for each --adapter; 1 by default.")
    ] = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    output: Annotated[Path | None, typer.Option(help="The new directory; by default ADAPTER-merged.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the merged weights; by default each tensor keeps the base's own.")
    ] = None,
    base_precision: Annotated[
        BasePrecision,
        typer.Option(help="The base as it is stored, or quantised and back as a 4-bit or 8-bit training saw it."),
    ] = BasePrecision.original,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest file, such as 5GB; by default the files are cut as the base's are.")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the result with base + adapter on a few prompts; by default where both fit into memory.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    force: ForceOption = False,
    push: PushOption = None,
) -> None:
    """Merge adapters into their base. The result is a plain checkpoint that needs nothing of ours."""
    limit = None if shard_size is None else read_size(shard_size)
    quiet_libraries()
    from abba_cli.merging import merge as run
    from abba_cli.pushing import check_push
    from abba_cli.pushing import push as upload
    from abba_cli.ui.steps import StepsDisplay, show_merged, show_pushed

    if push is not None:
        check_push(push)
    console = open_console()
    with interruptible("nothing was written"), StepsDisplay(console) as display:
        merged = run(
            adapter,
            weights=weight or None,
            base=base,
            revision=revision,
            output=output,
            dtype=None if dtype is None else dtype.value,
            base_precision=base_precision.value,
            shard_bytes=limit,
            verify=verify,
            overwrite=overwrite,
            force=force,
            listen=display,
        )
    show_merged(console, merged)
    if push is not None:
        with interruptible(f"{merged.path} is complete, but not uploaded"), StepsDisplay(console) as display:
            url = upload(merged.path, push, listen=display)
        show_pushed(console, url)
