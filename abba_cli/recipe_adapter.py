"""The recipe's `adapter` section: what is trained, by which method, and how large it is."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from abba_cli.recipe_section import LayerNames, Rank, Regex, Section, Share

Method = Literal["abba", "lora", "rslora", "dora", "hira", "loha", "pissa", "full"]
METHODS: tuple[str, ...] = get_args(Method)
_PAIRS = {"abba": 2, "loha": 2}
"""Pairs (B, A) of a method; of all others there is one. A pair of rank r has r (m + n) parameters."""
_RANK_ALPHA = ("rank", "alpha", "alpha_pattern", "dropout")
_KEYS: dict[str, tuple[str, ...]] = {
    "abba": ("r1", "r2", "pairs", "combine", "scale_exponent", "init", "kernel", "alpha", "alpha_pattern", "dropout"),
    "hira": ("rank", "dropout"),
    "loha": ("rank", "alpha", "alpha_pattern"),
    "full": (),
    "pissa": (*_RANK_ALPHA, "init"),
}
_PISSA_STARTS = ("svd", "niter_16")


class BudgetSection(Section):
    """As many parameters as another method has."""

    like: Method = Field("lora", description="The method whose size is meant; abba's r1 and r2 are both `rank`.")
    rank: Rank = Field(description="Its rank.")

    @property
    def size(self) -> int:
        """Trained parameters as a multiple of m + n, without what a method has besides (DoRA: another m)."""
        return _PAIRS.get(self.like, 1) * self.rank


class AdapterSection(Section):
    """What is trained: dW = s (B1 A1) * (B2 A2) on every targeted linear layer, or another method's update."""

    model_config = ConfigDict(validate_default=True)

    method: Method = Field(
        "abba",
        description="The method. full trains the targeted layers' weights whole; all others but abba are PEFT's own "
        "implementations, to compare with.",
    )
    budget: BudgetSection | None = Field(
        None,
        description="Ranks that give as many trained parameters as another method has, or the next larger number: "
        "`{like: lora, rank: 32}`. Ranks given besides must fit it.",
    )
    combine: Literal["hadamard", "sum"] | None = Field(
        None,
        description="abba: multiply the two pairs elementwise, or, as a control, add them: a LoRA of rank r1 + r2 with the scale "
        "s and both B at zero, where alpha null is 4. null is hadamard.",
    )
    scale_exponent: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="abba: e in s = alpha^2 / (r1*r2)^e; null is 0.5, the rank-stable one."
    )
    pairs: Annotated[int, Field(ge=2, le=8)] = Field(
        2, description="abba: pairs that are multiplied; more than 2 make a chain, whose pairs all have rank r1 = r2."
    )
    r1: Rank | None = Field(
        None, description="abba: rank of the first pair, which starts from the weight's singular vectors; null is 16."
    )
    r2: Rank | None = Field(None, description="abba: rank of the second pair, which starts at zero; null is 16.")
    rank: Rank | None = Field(None, description="Of the other methods: the rank; null is 32 (loha: 16), abba's size.")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Sets the scale. abba: s = alpha^2 / sqrt(r1*r2), null is 16; the paper finds 16 to 32 best, 64 collapses. "
        "lora, dora: alpha / rank, null is 2*rank. loha, pissa: the same, null is rank. rslora: alpha / sqrt(rank), null is 16. "
        "hira has none.",
    )
    init: Literal["svd", "random", "swapped", "zeros", "ones", "roots", "top_next", "next_top", "niter_16"] | None = Field(
        None,
        description="abba: start of the factors. svd (null): the paper's truncated SVD of the weight, and B2 = 0. random: B1 A1 "
        "random. swapped: pair 2 has the SVD, B1 = 0. zeros: B1 = B2 = 0, which never learns. Away from the base: ones (SVD, and "
        "B2 A2 = 1), roots (SVDs of the weight's elementwise root), top_next and next_top (first and next singular vectors). "
        "pissa: svd (null), or niter_16, a randomised SVD of 16 iterations, which is faster.",
    )
    dropout: Share = Field(0.0, description="Dropout on the input of the update; loha has none.")
    targets: LayerNames = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Layers to adapt: a list of module names, `all-linear`, or one regular expression over full names.",
    )
    exclude: LayerNames | None = Field(None, description="Layers to leave out, written as in `targets`.")
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Numbers of the blocks to adapt; null adapts all of them."
    )
    rank_pattern: dict[Regex, Rank | tuple[Rank, Rank]] = Field(
        {}, description="Other ranks for some layers: name or regular expression to N or, with abba, [r1, r2]."
    )
    alpha_pattern: dict[Regex, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Another alpha for some layers: name or regular expression."
    )
    modules_to_save: list[str] = Field(
        [], description="Modules that are trained whole and saved with the adapter, such as embed_tokens or lm_head."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Data type of the factors.")
    kernel: Literal["auto", "factored", "effective"] | None = Field(
        None,
        description="abba: how the update is computed: through W0 + dW (effective), beside the base's product (factored), or the "
        "faster way for each call (auto, null). Same results up to rounding.",
    )
    start_from: str | None = Field(
        None,
        min_length=1,
        description="A trained adapter or run directory to go on from; its ranks and targets must be the recipe's. "
        "Relative to the current directory, as `output` is.",
    )

    @field_validator("r1", "r2", "rank", "alpha", "combine", "scale_exponent", "init", "kernel")
    @classmethod
    def _fill_in(cls, value: Any, info: ValidationInfo) -> Any:
        """Write out what the method decides where nothing is given, so that a resolved recipe says it."""
        return _default(str(info.field_name), info.data) if value is None else value

    @model_validator(mode="after")
    def _keys_fit_method(self) -> "AdapterSection":
        keys = _KEYS.get(self.method, _RANK_ALPHA)
        for key in (*_KEYS["abba"], "rank", *(["budget", "rank_pattern"] if self.method == "full" else [])):
            if key not in keys and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} does not go with method {self.method}, which has {', '.join(keys) or 'no size to set'}")
        if self.method != "abba" and any(isinstance(rank, tuple) for rank in self.rank_pattern.values()):
            raise ValueError(f"rank_pattern has a pair of ranks, but {self.method} has one rank: expected a number for each name")
        self._start_is_the_methods()
        if self.combine == "sum" and (self.init != "zeros" or self.kernel != "auto"):
            raise ValueError("combine: sum starts with both B at zero, and has no kernels: leave init and kernel out")
        if self.pairs > 2:
            self._is_plain_chain()
        step = self.pairs if self.pairs > 2 else 2 if self.method == "loha" else 1  # by which the size can grow
        if self.budget is not None and not 0 <= self.size - self.budget.size < step:
            raise ValueError(
                f"budget is {self.budget.size} (m + n) parameters a layer, but the ranks given have {self.size} (m + n); "
                "leave r2 (or rank) out and it follows from the budget"
            )
        return self

    def _start_is_the_methods(self) -> None:
        if self.method == "abba" and self.init == "niter_16":
            raise ValueError("init: niter_16 is a start of method pissa; leave init out, or set method to pissa")
        if self.method == "pissa" and self.init not in _PISSA_STARTS:
            raise ValueError(f"init: {self.init} is a start of method abba; pissa has {' and '.join(_PISSA_STARTS)}")
        if self.method == "pissa" and self.start_from is not None:
            raise ValueError(
                "start_from does not go with method pissa, which starts from the base's own weights: merge the adapter and name "
                "the result in model.name, or go on with method lora (a pissa run is a lora of twice its rank and alpha)"
            )

    def _is_plain_chain(self) -> None:
        plain = {"combine": "hadamard", "init": "svd", "kernel": "auto", "dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
        if other := [key for key, value in plain.items() if getattr(self, key) != value]:
            raise ValueError(f"a chain of {self.pairs} pairs takes no {other[0]} of its own: leave it out, or set pairs to 2")
        if self.r1 != self.r2:
            raise ValueError(f"the pairs of a chain have one rank, but r1 is {self.r1} and r2 is {self.r2}: make them equal")

    @field_validator("method", mode="before")
    @classmethod
    def _absent_methods(cls, value: Any) -> Any:
        if str(value).lower() in _ABSENT:
            raise ValueError(f"{value} is in no library that abba builds on; it has {', '.join(METHODS)}")
        return value

    @property
    def is_abba(self) -> bool:
        """Whether our own layers are trained, not PEFT's."""
        return self.method == "abba" and self.combine == "hadamard" and self.pairs == 2

    @property
    def size(self) -> int:
        """Trained parameters as a multiple of m + n; `BudgetSection.size`."""
        if self.method == "abba":
            assert self.r1 is not None
            assert self.r2 is not None
            return self.r1 + self.r2 if self.pairs == 2 else self.pairs * self.r1
        assert self.rank is not None  # full has no budget to compare with
        return _PAIRS.get(self.method, 1) * self.rank


_ABSENT = ("lora-pro", "lorapro", "lora_pro", "mora", "krona")


def _default(key: str, above: Mapping[str, Any]) -> Any:
    """What a key is where the recipe gives nothing, from the keys above it; those of a wrong kind are not there."""
    method, budget = above.get("method"), above.get("budget")
    size = 32 if budget is None else budget.size
    match method, key:
        case "abba", "r1" | "r2" if above.get("pairs", 2) > 2:
            return above.get("r1") or math.ceil(size / above["pairs"])
        case "abba", "r1":
            return max(1, size // 2)
        case "abba", "r2":
            return max(1, size - above["r1"]) if budget and above.get("r1") else 16
        case "abba", "alpha":
            return 4.0 if above.get("combine") == "sum" else 16.0
        case "abba", "combine":
            return "hadamard"
        case "abba", "scale_exponent":
            return 0.5
        case "pissa", "init":
            return "svd"
        case "abba", "init":
            return "zeros" if above.get("combine") == "sum" else "svd"
        case "abba", "kernel":
            return "auto"
        case "lora" | "rslora" | "dora" | "pissa" | "hira" | "loha", "rank":
            return math.ceil(size / _PAIRS.get(method, 1))
        case "lora" | "dora", "alpha" if above.get("rank"):
            return 2.0 * above["rank"]
        case "loha" | "pissa", "alpha" if above.get("rank"):
            return float(above["rank"])
        case "rslora", "alpha":
            return 16.0
    return None
