"""The matrices to approximate: those of the paper's Figure 2, an image, or a weight of a checkpoint."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from abba_cli.bases import find_base
from abba_cli.checkpoint import Checkpoint, Stored, download, read_checkpoint
from abba_cli.errors import DataError, ModelError
from abba_cli.recipe import ModelSection

SYNTHETIC = ("random", "orthogonal", "sparse", "low-rank", "block-diagonal")
DENSITY = 0.1  # of the sparse matrix
RANK_SHARE = 8  # the low-rank matrix has one singular value for every 8 rows
NOISE = 0.01  # share of the norm of the low-rank matrix that is added as noise
BLOCKS = 8


@dataclass(frozen=True)
class Target:
    """A matrix to approximate.

    Args:
        name: As in the table of fits.
        group: What it is averaged with: a type of layer, or its own name.
        load: Reads or makes it, in float32 (float64 where it is stored so).
    """

    name: str
    group: str
    load: Callable[[], torch.Tensor]


def find_matrix(text: str, size: int, seed: int) -> Target:
    """What a command line names: random, an image file, or CHECKPOINT:TENSOR.

    Args:
        text: What it names.
        size: Rows and columns of a matrix that is made, and the longest side of an image.
        seed: Of a matrix that is made.

    Raises:
        DataError: It is none of these, or a file that cannot be read as an image.
        ModelError: There is no such checkpoint or tensor.
    """
    if text in SYNTHETIC:
        return Target(text, text, lambda: synthetic(text, size, seed))
    if os.path.isfile(Path(text).expanduser()):  # of Path, it raises for a name that is too long
        picture = read_image(Path(text).expanduser(), size)
        return Target(text, text, lambda: picture)
    location, colon, tensor = text.rpartition(":")
    if colon and location not in ("", "package") and tensor:
        stored = _find_tensor(read_weights(location), tensor)
        return Target(text, text, lambda: read_matrix(stored))
    near = difflib.get_close_matches(text, SYNTHETIC, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(
        f"there is no matrix {text!r}; expected one of {', '.join(SYNTHETIC)}, an image file, or CHECKPOINT:TENSOR (a folder, "
        f"hub id or package:NAME, and a name in its safetensors files){hint}"
    )


def synthetic(kind: str, size: int, seed: int) -> torch.Tensor:
    """Make one of the paper's kinds of square matrices.

    Guessed from the paper's errors of LoRA, which these definitions give to their last digit at 1024 (docs/reconstruct.md):

    random            uniform in [0, 1): three quarters of its energy are its mean
    orthogonal        Q of a Gaussian's QR decomposition
    sparse            uniform in [0, 1), of which 90% are zero
    low-rank          size / 8 equal singular values, and Gaussian noise of 1% of their norm
    block-diagonal    8 Gaussian blocks (not in the paper's numbers)

    Args:
        kind: One of SYNTHETIC.
        size: Rows and columns.
        seed: The same one gives the same matrix.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    def uniform() -> torch.Tensor:
        return torch.rand(size, size, generator=generator, dtype=torch.float64)

    match kind:
        case "random":
            made = uniform()
        case "orthogonal":
            made = torch.linalg.qr(gaussian(size, size)).Q
        case "sparse":
            made = uniform() * (uniform() < DENSITY)
        case "low-rank":
            rank = max(1, size // RANK_SHARE)
            made = torch.linalg.qr(gaussian(size, rank)).Q @ torch.linalg.qr(gaussian(size, rank)).Q.T
            noise = gaussian(size, size)
            made += NOISE * made.norm() / noise.norm() * noise
        case _:
            sizes = [len(block) for block in torch.arange(size).chunk(BLOCKS)]
            made = torch.block_diag(*(gaussian(block, block) for block in sizes))  # type: ignore[no-untyped-call]
    return made.float()


def read_image(file: Path, size: int) -> torch.Tensor:
    """Read an image as grey levels from 0 to 1, made smaller where a side is longer than `size`.

    Raises:
        DataError: It is no image, or broken.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            grey = image.convert("L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is none, or of a kind that is not known here" if unknown else str(error)
        raise DataError(f"cannot read {file} as an image: {reason}; expected a PNG, JPEG or the like") from None
    grey.thumbnail((size, size))
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width) / 255


def read_weights(location: str) -> Checkpoint:
    """The headers of a checkpoint's weights.

    Args:
        location: What `model.name` of a recipe takes: a hub id, a local directory, or `package:IMPORT_NAME`.

    Raises:
        ModelError: It cannot be had, or has no safetensors weights.
    """
    folder = Path(location).expanduser()
    return read_checkpoint(download(find_base(ModelSection(name=str(folder) if folder.is_dir() else location))))


def read_matrix(stored: Stored) -> torch.Tensor:
    """Read a tensor in float32, or float64 where it is stored so.

    Raises:
        ModelError: It is stored quantised, or cut short.
    """
    weight = stored.rows()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _find_tensor(checkpoint: Checkpoint, name: str) -> Stored:
    stored = checkpoint.tensors.get(name)
    if stored is None:
        near = difflib.get_close_matches(name, checkpoint.tensors, n=3, cutoff=0.5)
        some = near or [one for one, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2][:3]
        raise ModelError(
            f"{checkpoint.folder} has no tensor {name!r} among its {len(checkpoint.tensors):,}; "
            f"{'the nearest names' if near else 'some of its names'}: {', '.join(some)}"
        )
    if len(stored.shape) != 2:
        raise ModelError(f"{name} in {checkpoint.folder} has the shape {list(stored.shape)}; expected a matrix, with two sides")
    return stored
