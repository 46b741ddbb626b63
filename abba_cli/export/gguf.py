"""A merged model as one GGUF file, written by llama.cpp's own converter."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from abba_cli.disk import disk_errors
from abba_cli.errors import ModelError
from abba_cli.export.converter import Converter, Outtype, failure, run

Progress = Callable[[int, int], None]


def convert(
    folder: Path, file: Path, outtype: Outtype, converter: Converter, progress: Progress | None = None, name: str | None = None
) -> None:
    """Convert a Hugging Face checkpoint to GGUF.

    Args:
        folder: The checkpoint, with its tokenizer's files as they are published (`tokenizer.model` included, where there is one).
        file: The GGUF to be; it appears when it is complete.
        outtype: The type of the matrices; vectors stay float32.
        converter: From `find_converter`, after `check_converter`.
        progress: Called with the percentage written and 100.
        name: What the model is called inside the file; the converter makes one up from the folder's name otherwise.

    Raises:
        ModelError: The converter failed; the message has its own last line.
        RunError: The disk is full or read-only.
    """

    def listen(line: str) -> None:
        # tqdm's bar in https://github.com/ggml-org/llama.cpp/blob/7bca1fd9ca2a681b0182e16f24f832b7be1942af/gguf-py/gguf/gguf_writer.py
        percentage = re.match(r"Writing:\s+(\d+)%", line)
        if percentage and progress:
            progress(int(percentage[1]), 100)

    with disk_errors(file):
        # The converter reads braces in a file's name as a pattern, so it is given a plain one.
        scratch = Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=file.parent))
    try:
        made = scratch / "model.gguf"
        arguments = ["--outtype", outtype, "--outfile", str(made), *(["--model-name", name] if name else []), str(folder)]
        status, output = run(converter, arguments, listen)
        if status:
            raise failure(converter, status, output)
        if not made.is_file():
            raise ModelError(f"the converter in {converter} ended well but wrote no single file; expected {made.name}")
        with disk_errors(file):
            os.replace(made, file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def adds_bos(file: Path) -> bool | None:
    """Whether llama.cpp puts a beginning-of-sequence token before what it is given, by a GGUF's own word.

    None where the file does not say, or the package `gguf` is not there to read it.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        return None
    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return None if field is None else bool(field.contents())
