"""Plain safetensors checkpoints, read and written tensor by tensor, so that memory is bounded by a tensor and not by a file.

The `safetensors` library maps a whole file or takes a whole dictionary; its format is simple enough to stream: 8 bytes with the
header's length (little-endian), the header in JSON, the data. https://github.com/huggingface/safetensors#format
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from abba_cli.bases import Base
from abba_cli.errors import ModelError
from abba_cli.folders import leads_out
from abba_cli.hub import explain

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating types of a plain checkpoint, by their names in a safetensors header."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        name: Its name.
        dtype: As in the header, such as BF16.
        shape: Its shape.
        file: The file that holds it.
        begin: Where its bytes begin in the file.
        size: Number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms.

        Raises:
            ModelError: It is no floating type: the checkpoint is stored quantised.
        """
        if self.dtype not in DTYPES:
            raise ModelError(
                f"{self.file.name}: {self.name} is stored as {self.dtype}; expected {', '.join(DTYPES)}. A quantised checkpoint "
                "cannot take a merge: name the original with --base"
            )
        return DTYPES[self.dtype]

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read rows (the first dimension), or all of it."""
        shape = list(self.shape)
        row = self.size // max(1, shape[0]) if shape else self.size
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape[0] = stop - start
        tensor = torch.empty(shape, dtype=self.torch_dtype)
        if tensor.numel():
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.begin + start * row)
                buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
                while buffer:
                    got = stream.readinto(buffer)
                    if not got:
                        raise ModelError(f"{self.file} is cut short: {self.name} is not whole; download it again")
                    buffer = buffer[got:]
        return tensor

    def copy_to(self, stream: IO[bytes]) -> None:
        """Write its bytes as they are."""
        with self.file.open("rb") as source:
            source.seek(self.begin)
            left = self.size
            while left:
                piece = source.read(min(left, _COPY_BYTES))
                if not piece:
                    raise ModelError(f"{self.file} is cut short: {self.name} is not whole; download it again")
                stream.write(piece)
                left -= len(piece)


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder with safetensors weights.

    Args:
        folder: The folder.
        tensors: Every tensor by name, in the order of the files.
        metadata: Of each file's header, by the file's name.
        index: The metadata of model.safetensors.index.json; None for a single file.
    """

    folder: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, dtype as in a header, shape, and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def download(base: Base) -> Path:
    """The local folder of a base: a directory as it is, or the files of a hub repository that a checkpoint consists of.

    Raises:
        ModelError: It cannot be had.
    """
    if Path(base.location).is_dir():
        return Path(base.location)
    with explain(f"model {base.location}", page=base.location):
        small = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "LICENSE*", "NOTICE*"]
        keywords: dict[str, Any] = {"revision": base.revision, "ignore_patterns": ["*/*"]}
        folder = Path(snapshot_download(base.location, allow_patterns=small, **keywords))
        # By name: some repositories hold the same weights a second time, as consolidated files.
        return Path(snapshot_download(base.location, allow_patterns=[*small, *_weight_files(folder)], **keywords))


def _weight_files(folder: Path) -> list[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    tree = json.loads(index.read_text(encoding="utf-8"))
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} names no files of weights (weight_map); download it again")
    for name in names.values():
        # A merge writes files of the same names, so one with a path in it would be written elsewhere.
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names the file {str(name)[:80]!r}; expected the bare names of .safetensors files beside it"
            )
    return list(dict.fromkeys(names.values()))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint's files.

    Raises:
        ModelError: There are no safetensors weights, a shard is missing, or a file is broken.
    """
    with explain(f"model {folder}"):
        names = _weight_files(folder)
        index_file = folder / SAFE_WEIGHTS_INDEX_NAME
        index = json.loads(index_file.read_text(encoding="utf-8")) if index_file.is_file() else None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ModelError(f"{folder} has no {', '.join(missing)}; expected a model with safetensors weights, found {found}")
    tensors: dict[str, Stored] = {}
    metadata = {}
    for name in names:
        shard, metadata[name] = read_file(folder / name)
        tensors |= shard
    return Checkpoint(folder, tensors, metadata, None if index is None else index.get("metadata", {}))


def read_file(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read the header of one safetensors file: its tensors in their order, and its metadata.

    Raises:
        ModelError: It is no safetensors file, or cut short.
    """
    header, begin = _read_header(file)
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for key, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = value["data_offsets"]
        stored = Stored(key, value["dtype"], tuple(value["shape"]), file, begin + first, last - first)
        if stored.dtype in DTYPES and prod(stored.shape) * DTYPES[stored.dtype].itemsize != stored.size:
            raise ModelError(
                f"{file} is broken: {key} of shape {list(stored.shape)} has {stored.size:,} bytes; download it again"
            )
        tensors[key] = stored
    return tensors, metadata


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            if not 2 <= size <= file.stat().st_size - 8:
                raise ValueError("no header")
            header = json.loads(stream.read(size))
            end = max((_end(value) for key, value in header.items() if key != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise ModelError(f"{file} is no safetensors file ({error}); download it again") from None
    if 8 + size + end > file.stat().st_size:
        raise ModelError(f"{file} is cut short ({file.stat().st_size:,} of {8 + size + end:,} bytes); download it again")
    return header, 8 + size


def _end(tensor: Mapping[str, Any]) -> int:
    """Where a tensor of a header ends.

    Raises:
        ValueError, TypeError, KeyError: It is not described as tensors are.
    """
    first, last = tensor["data_offsets"]
    numbers = [first, last, *tensor["shape"]]
    if (
        not all(isinstance(number, int) and number >= 0 for number in numbers)
        or last < first
        or not isinstance(tensor["dtype"], str)
    ):
        raise ValueError("a tensor of no type, shape or place")
    return int(last)


def planned(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Planned:
    """A tensor of a floating type, to be written."""
    return Planned(name, NAMES[dtype], shape, prod(shape) * dtype.itemsize)


def write_header(stream: IO[bytes], tensors: Sequence[Planned], metadata: Mapping[str, str]) -> None:
    """Write the head of a file whose tensors' bytes follow, in this order and without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned to 8 bytes, as the library does it
    stream.write(len(text).to_bytes(8, "little") + text)


def write_tensor(stream: IO[bytes], tensor: torch.Tensor) -> None:
    """Write a tensor's bytes."""
    stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def arrange(tensors: Iterable[Planned], limit: int) -> list[list[Planned]]:
    """Cut a list of tensors into files of at most `limit` bytes; a larger tensor gets a file of its own."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def copy_small_files(source: Path, target: Path) -> list[str]:
    """Copy what stands beside the weights: tokenizer, chat template, generation config, licence; not other weights or cards.

    Returns:
        The names of the copied files.

    Raises:
        ModelError: One is a link that leads out of the folder, and could be anything.
    """
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
    copied = []
    for file in sorted(source.iterdir()):
        if file.is_symlink() and leads_out(file, source):
            raise ModelError(f"{file} is a link to {file.resolve()}, outside of the model's folder; put the file itself there")
        if (
            file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith(weights)
            and file.name not in ("README.md",)
        ):
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    return copied
