"""Options that several commands share."""

import enum
from typing import Annotated

import typer


class Dtype(enum.StrEnum):
    """Floating types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class QuantizationName(enum.StrEnum):
    """What `--quantization` takes."""

    NONE = "none"
    NF4 = "nf4"
    INT8 = "int8"


BaseOption = Annotated[str | None, typer.Option("--base", help="The base, where it is not the recorded one; needs --force then.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the base.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Take a base that is not the one the adapter was trained on.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that this program has made.")]
PushOption = Annotated[
    str | None,
    typer.Option("--push", metavar="REPO", help="Upload the result to this hub repository (private if it is new)."),
]
