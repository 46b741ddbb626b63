"""The settings of one ABBA adapter, as PEFT stores them in `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig
from peft.utils import PeftType

from .starts import STARTS, Start

BIAS = ("none", "all", "abba_only")
KERNELS = ("auto", "factored", "effective")


@dataclass
class AbbaConfig(PeftConfig):
    """Configuration of an `AbbaModel`: dW = s (B1 A1) * (B2 A2) with s = alpha^2 / (r1 r2)^scale_exponent.

    The fields that ABBA shares with PEFT's own methods mean what they mean there. Every field is described in its
    `help` metadata. Defaults of `r1`, `r2` and `alpha`: https://arxiv.org/abs/2505.14238 (r1 = r2 = 16 has the size
    of a LoRA of rank 32; the best range found for alpha is 16 to 32).

    Raises:
        ValueError: a field has a value outside what its description allows.
    """

    r1: int = field(default=16, metadata={"help": "Rank of the first pair, B1 A1. May exceed the layer's size."})
    r2: int = field(default=16, metadata={"help": "Rank of the second pair, B2 A2. Independent of r1."})
    alpha: float = field(
        default=16.0, metadata={"help": "Strength of the update: it is multiplied by alpha^2 / (r1 r2)^scale_exponent."}
    )
    scale_exponent: float = field(
        default=0.5,
        metadata={
            "help": "Exponent of the ranks in the scale alpha^2 / (r1 r2)^e; 1/2 is the rank-stable one, 0 leaves them out."
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability, in training, of dropping an element of the input of dW."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: a list of names (exact, or the end of the dotted name), a regular expression, "
            "'all-linear', or None for PEFT's default of a known architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: a list of names or a regular expression."}
    )
    bias: str = field(
        default="none",
        metadata={"help": "Biases to train: 'none', 'all', or 'abba_only' (those of the adapted layers)."},
    )
    init_weights: bool | Start = field(
        default=True,
        metadata={
            "help": "True or 'svd': B1 A1 is the truncated SVD of the base weight and B2 = 0, as in the paper. "
            "'random': B1, A1 random and B2 = 0. Either way a fresh adapter changes nothing. The others of the paper's ablation: "
            "'swapped', 'zeros', and, away from the base, 'ones', 'roots', 'top_next', 'next_top' (see adapter/starts.py). "
            "False: all four factors random, times s^(-1/4) each, so a fresh adapter does change the model (for tests)."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt; None is all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the `nn.ModuleList` that `layers_to_transform` counts in, such as 'layers' or 'h'."},
    )
    rank_pattern: dict[str, int | list[int]] | None = field(
        default_factory=dict,
        metadata={"help": "Ranks of particular modules: name or regular expression -> N (r1 = r2 = N) or [r1, r2]."},
    )
    alpha_pattern: dict[str, float] | None = field(
        default_factory=dict, metadata={"help": "Alphas of particular modules: name or regular expression -> alpha."}
    )
    kernel: Literal["auto", "factored", "effective"] = field(
        default="auto",
        metadata={
            "help": "How the update is computed: 'effective' (through W0 + dW), 'factored' (beside the base's product, through "
            "the Khatri-Rao factors), or 'auto', the faster one for each call. The results agree up to rounding."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from the adapted ones to train and save whole."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        # JSON gives the type as a plain string, while a config written by hand leaves it out. Layers use this to put
        # off the SVD, which a saved adapter that is about to be loaded does not need (see AbbaLayer.pending_svd).
        self.read_from_file = type(self.peft_type) is str
        self.peft_type = PeftType("ABBA")
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._check()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's configs do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def ranks_for(self, pattern_key: str) -> tuple[int, int]:
        """Returns (r1, r2) for a key of `rank_pattern`, or the default ranks if there is no such key."""
        ranks = (self.rank_pattern or {}).get(pattern_key, [self.r1, self.r2])
        if isinstance(ranks, int):
            return ranks, ranks
        r1, r2 = ranks
        return r1, r2

    def _check(self) -> None:
        check_rank("r1", self.r1)
        check_rank("r2", self.r2)
        check_alpha("alpha", self.alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` is {self.dropout!r}, but it has to be at least 0 and less than 1.")
        if not isinstance(self.init_weights, bool) and self.init_weights not in STARTS:
            raise ValueError(f"`init_weights` is {self.init_weights!r}, not one of {(True, False, *STARTS)}.")
        if not isinstance(self.scale_exponent, (int, float)) or not 0 <= self.scale_exponent <= 2:
            raise ValueError(f"`scale_exponent` is {self.scale_exponent!r}, but it has to be between 0 and 2.")
        if self.bias not in BIAS:
            raise ValueError(f"`bias` is {self.bias!r}, but it has to be one of {BIAS}.")
        if self.kernel not in KERNELS:
            raise ValueError(f"`kernel` is {self.kernel!r}, but it has to be one of {KERNELS}.")
        for key, ranks in (self.rank_pattern or {}).items():
            pair = ranks if isinstance(ranks, (list, tuple)) else [ranks, ranks]
            if len(pair) != 2:
                raise ValueError(f"`rank_pattern[{key!r}]` is {ranks!r}, but it has to be N or [r1, r2].")
            for rank in pair:
                check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in (self.alpha_pattern or {}).items():
            check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def check_rank(name: str, rank: object) -> None:
    """Raises ValueError unless `rank` is a positive whole number."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise ValueError(f"`{name}` should be a positive integer value but the value passed is {rank!r}.")


def check_alpha(name: str, alpha: object) -> None:
    """Raises ValueError unless `alpha` is a positive number."""
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not alpha > 0:
        raise ValueError(f"`{name}` should be a positive number but the value passed is {alpha!r}.")
