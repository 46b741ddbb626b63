"""`abba export`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from abba_cli.commands.options import BaseOption, ForceOption, OverwriteOption, PushOption, RevisionOption
from abba_cli.terminal import interruptible, open_console, quiet_libraries


class Format(enum.StrEnum):
    """What can be exported."""

    lora = "lora"
    loha = "loha"
    gguf_lora = "gguf-lora"
    gguf = "gguf"
    abba = "abba"


class Number(enum.StrEnum):
    """Types of the numbers in an export."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    q8_0 = "q8_0"
    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"


_LONG = {Number.f32: Number.float32, Number.bf16: Number.bfloat16, Number.f16: Number.float16}


def export(
    adapter: Annotated[
        str,
        typer.Option(
            help="A run or adapter directory, a folder of runs (its newest finished run), or a hub id.", show_default=False
        ),
    ],
    format: Annotated[
        Format,
        typer.Option(
            help="lora and loha are PEFT's, gguf-lora and gguf llama.cpp's, abba is our own adapter again.", show_default=False
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="The new directory; by default ADAPTER-FORMAT.")] = None,
    dtype: Annotated[
        Number | None,
        typer.Option(help="Type of the numbers; by default float32, for gguf float16. q8_0 is for gguf alone."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="For lora and gguf-lora: the best approximation of this rank, instead of the exact rank r1*r2."),
    ] = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="A checkout of llama.cpp, for gguf.")
    ] = None,
    overwrite: OverwriteOption = False,
    force: ForceOption = False,
    push: PushOption = None,
) -> None:
    """Write an adapter in another program's format."""
    quiet_libraries()
    from abba_cli.exporting import export as run
    from abba_cli.pushing import check_push
    from abba_cli.pushing import push as upload
    from abba_cli.ui.steps import StepsDisplay, show_exported, show_pushed

    if push is not None:
        check_push(push)
    console = open_console()
    with interruptible("nothing was written"), StepsDisplay(console) as display:
        exported = run(
            adapter,
            format.value,
            output=output,
            dtype=None if dtype is None else _LONG.get(dtype, dtype).value,
            rank=rank,
            base=base,
            revision=revision,
            llama_cpp=llama_cpp,
            overwrite=overwrite,
            force=force,
            listen=display,
        )
    show_exported(console, exported)
    if push is not None:
        with interruptible(f"{exported.path} is complete, but not uploaded"), StepsDisplay(console) as display:
            url = upload(exported.path, push, listen=display)
        show_pushed(console, url)
