"""The table of fits, reconstruction.csv: written after each fit, and read again to go on."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import RunError

CSV = "reconstruction.csv"


@dataclass(frozen=True)
class Fit:
    """One fit of one method to one matrix.

    Args:
        matrix: Name of the matrix.
        group: What it is averaged with.
        digest: Of the matrix's numbers, so that another one of the same name is not taken for it.
        m: Its rows.
        n: Its columns.
        method: lora, abba or loha.
        rank: LoRA's rank of the same number of parameters.
        parameters: How many numbers the factors hold.
        solver: svd, als or adam.
        r1: Rank of the first pair; 0 for LoRA.
        r2: Rank of the second pair; 0 for LoRA.
        restart: From 0.
        start: Where the factors began; empty for LoRA.
        seed: Of the start.
        limit: Sweeps that were allowed; 0 for LoRA.
        steps: Sweeps that were made, or steps of Adam.
        error: Squared relative error.
        seconds: Time that it took.
    """

    matrix: str
    group: str
    digest: str
    m: int
    n: int
    method: str
    rank: int
    parameters: int
    solver: str = "svd"
    r1: int = 0
    r2: int = 0
    restart: int = 0
    start: str = ""
    seed: int = 0
    limit: int = 0
    steps: int = 0
    error: float = 1.0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str, int, int, int, int]:
        """What makes it the same fit as one of an earlier call."""
        return self.matrix, self.digest, self.method, self.solver, self.rank, self.restart, self.seed, self.limit


def read_fits(folder: Path) -> list[Fit]:
    """The fits of earlier calls; none where there is no table yet.

    Raises:
        RunError: The table was written by something else, or is broken.
    """
    file = folder / CSV
    if not file.is_file():
        return []
    with disk_errors(file), file.open(encoding="utf-8", newline="") as stream:
        try:
            reader = csv.DictReader(stream, strict=True)
            if reader.fieldnames != _COLUMNS:
                raise ValueError("its columns are not those of `abba reconstruct`")
            return [_read(row) for row in reader]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise RunError(f"cannot go on with {file}: {error}; choose another --output, or remove the file") from None


def _read(row: dict[str, str]) -> Fit:
    kinds = {"int": int, "float": float, "str": str}
    types = {field.name: kinds[getattr(field.type, "__name__", str(field.type))] for field in fields(Fit)}
    fit = Fit(**{name: types[name](row[name]) for name in _COLUMNS})
    if not math.isfinite(fit.error):
        raise ValueError(f"an error of {fit.error}")
    return fit


def write_fits(folder: Path, fits: Sequence[Fit]) -> None:
    """Write the table whole, so that a reader sees all of a row or nothing of it.

    Raises:
        RunError: It cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(fit) for fit in fits)
    with disk_errors(folder / CSV):
        write_atomically(folder / CSV, text.getvalue())


_COLUMNS = [field.name for field in fields(Fit)]
