"""What is measured: the shapes of the models and the rows of each grid. Loads no heavy library."""

from dataclasses import dataclass, replace

GRIDS = ("headline", "tokens", "ranks", "shapes", "all", "smoke")

PEERS = ("floor", "LoRA", "LoRA, base dtype", "DoRA", "HiRA", "LoHa", "full")
REFERENCE, OURS = "authors", "ABBA"
FACTORED, EFFECTIVE = "ABBA, factored", "ABBA, effective"
# bitsandbytes' weights cannot be trained, and neither LoHa nor the authors' layer knows them.
NOT_ON_NF4 = {"LoHa", "full", REFERENCE}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model; the weights are random."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = True

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(m, n) of the seven projections of one layer."""
        q, kv, h, f = self.heads * self.head_size, self.kv_heads * self.head_size, self.hidden, self.intermediate
        return ((q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f))

    @property
    def layer_parameters(self) -> int:
        """Weights of the seven projections of one layer."""
        return sum(m * n for m, n in self.linears)


# SmolLM2-135M, Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B; "tiny" is for `--grid smoke`.
SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 16, 256),
    "135M": Shape(576, 1536, 30, 9, 3, 64, 49152),
    "1B": Shape(2048, 8192, 16, 32, 8, 64, 128256),
    "3B": Shape(3072, 8192, 28, 24, 8, 128, 128256),
    "8B": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
}
SMALL_VOCABULARY = 1024  # where single layers are compared, the head is left almost out


@dataclass(frozen=True)
class Row:
    """One process: methods that take turns on the same base model and the same tokens.

    Args:
        shape: A key of SHAPES.
        layers: At most so many decoder layers; fewer where the memory asks for it.
        whole: Whether it stands for a whole model, with its vocabulary, rather than for layers cut out of one.
        batch: Sequences.
        length: Tokens of each sequence.
        rank: r1 = r2 of ABBA. The others get the rank that makes their parameters as many.
        precision: Of the base model: "bf16", "fp32" or "nf4".
        checkpointing: Whether gradient checkpointing is on.
        methods: What is measured.
    """

    shape: str
    layers: int
    whole: bool
    batch: int
    length: int
    rank: int
    precision: str
    checkpointing: bool
    methods: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def title(self) -> str:
        """The row in words."""
        checkpointed = ", checkpointed" if self.checkpointing else ""
        whole = "" if self.whole else " (layers)"
        return f"{self.shape}{whole}, {self.batch}x{self.length}, {self.precision}, r1 = r2 = {self.rank}{checkpointed}"


def rows_of(grid: str, device: str, reference: bool) -> list[Row]:
    """Returns the rows of a grid in the order of their importance.

    Args:
        grid: One of GRIDS.
        device: "cpu" or "cuda".
        reference: Whether the authors' layer can be measured.
    """
    names = ("headline", "tokens", "ranks", "shapes") if grid == "all" else (grid,)
    makers = {"headline": headline, "tokens": _tokens, "ranks": _ranks, "shapes": _shapes, "smoke": _smoke}
    rows = [row for name in names for row in makers[name](device)]
    if not reference:
        rows = [replace(row, methods=tuple(name for name in row.methods if name != REFERENCE)) for row in rows]
    return list(dict.fromkeys(rows))


def headline(device: str) -> list[Row]:
    """Whole models, at the sizes of the project's targets; the last two are for the growth of memory with the rank."""
    shape, batches = ("135M", [(4, 256), (2, 1024)]) if device == "cpu" else ("3B", [(1, 2048), (4, 2048), (8, 2048)])
    first = _row(shape, batches[0], whole=True)
    # All methods once; elsewhere those that the targets are about, since a step of the others takes a CPU a minute.
    narrow = ("floor", "LoRA", "LoHa", REFERENCE, OURS) if device == "cpu" else first.methods
    plain = [first, *(replace(first, batch=batch, length=length, methods=narrow) for batch, length in batches[1:])]
    wide = [_in_precision(replace(row, methods=narrow), "fp32") for row in plain] if device == "cpu" else []
    growth = [replace(first, rank=rank, methods=(OURS,)) for rank in (4, 32)]
    return [*plain, _in_precision(first, "nf4"), *growth, *wide]


def _tokens(device: str) -> list[Row]:
    batches = [(1, 256), (1, 512), (1, 1024), (1, 2048)]
    if device == "cuda":
        batches += [(2, 2048), (4, 2048), (8, 2048)]
    shapes = ("135M", "3B") if device == "cpu" else ("3B", "8B")
    return [_cut(shape, device, batch) for shape in shapes for batch in batches]


def _ranks(device: str) -> list[Row]:
    shapes, batch = (("135M", "1B", "3B"), (1, 512)) if device == "cpu" else (("3B", "8B"), (2, 2048))
    return [replace(_cut(shape, device, batch), rank=rank) for shape in shapes for rank in (2, 4, 8, 16, 32)]


def _shapes(device: str) -> list[Row]:
    batch = (1, 512) if device == "cpu" else (1, 2048)
    rows = [
        _in_precision(_cut(shape, device, batch), precision)
        for shape in list(SHAPES)[1:]
        for precision in ("bf16", "nf4", "fp32")
    ]
    return [replace(row, checkpointing=on) for row in rows for on in (False, True)]


def _smoke(device: str) -> list[Row]:
    return [replace(_with_ways(_row("tiny", (2, 24), whole=True)), rank=3)]


def _row(shape: str, batch: tuple[int, int], whole: bool) -> Row:
    return Row(shape, SHAPES[shape].layers, whole, *batch, 16, "bf16", False, (*PEERS, REFERENCE, OURS))


def _cut(shape: str, device: str, batch: tuple[int, int]) -> Row:
    return _with_ways(replace(_row(shape, batch, whole=False), layers=1 if device == "cpu" else 4))


def _with_ways(row: Row) -> Row:
    return replace(row, methods=(*row.methods, FACTORED, EFFECTIVE))


def _in_precision(row: Row, precision: str) -> Row:
    left_out = NOT_ON_NF4 if precision == "nf4" else {"LoRA, base dtype"} if precision == "fp32" else set()
    return replace(row, precision=precision, methods=tuple(name for name in row.methods if name not in left_out))
