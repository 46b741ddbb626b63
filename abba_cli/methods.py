"""The recipe's adapter section in PEFT's terms, and what the layers of each method have to tell."""

import math
from typing import Any

from peft import HiraConfig, LoHaConfig, LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from torch import nn

from abba_cli.adapter import AbbaConfig, scale
from abba_cli.adapter.layer import AbbaLayer
from abba_cli.bases import Base
from abba_cli.dense_methods import ChainConfig, FullConfig
from abba_cli.recipe_adapter import AdapterSection

CONFIGS: dict[str, type[PeftConfig]] = {
    "ABBA": AbbaConfig,
    "LORA": LoraConfig,
    "HIRA": HiraConfig,
    "LOHA": LoHaConfig,
    "FULL": FullConfig,
    "CHAIN": ChainConfig,
}
"""PEFT's names of the methods, as adapter_config.json has them, and their settings."""
DECISIVE = (
    *("r1", "r2", "r", "alpha", "lora_alpha", "scale_exponent", "dropout", "lora_dropout", "hira_dropout"),
    *("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "pairs"),
)
"""Settings that a saved adapter must share with the recipe that goes on from it."""
_PISSA: dict[str | None, Any] = {"svd": "pissa", "niter_16": "pissa_niter_16"}
_STARTS = ("init_weights", "init_lora_weights")


def adapter_config(adapter: AdapterSection, base: Base) -> PeftConfig:
    """Translate the recipe's section into PEFT's terms; the one place that does."""
    ranks: dict[str, Any] = {name: list(rank) if isinstance(rank, tuple) else rank for name, rank in adapter.rank_pattern.items()}
    common: dict[str, Any] = {
        "target_modules": adapter.targets,
        "exclude_modules": adapter.exclude,
        "layers_to_transform": adapter.layers,
        "modules_to_save": adapter.modules_to_save or None,
        "base_model_name_or_path": base.location,
        "revision": base.revision,
        "task_type": "CAUSAL_LM",
    }
    settings: Any = adapter  # the section has filled in what was left open
    if adapter.method == "full":
        return FullConfig(**common)
    if adapter.pairs > 2:
        return ChainConfig(
            pairs=adapter.pairs, r=settings.r1, alpha=settings.alpha, scale_exponent=settings.scale_exponent, **common
        )
    common["rank_pattern"] = ranks
    if adapter.combine == "sum":
        return _sum(adapter, common)
    alphas = dict(adapter.alpha_pattern)
    match adapter.method:
        case "abba":
            return AbbaConfig(
                r1=settings.r1,
                r2=settings.r2,
                alpha=settings.alpha,
                scale_exponent=settings.scale_exponent,
                dropout=adapter.dropout,
                kernel=settings.kernel,
                init_weights=settings.init,
                alpha_pattern=alphas,
                **common,
            )
        case "hira":
            return HiraConfig(r=settings.rank, hira_dropout=adapter.dropout, **common)
        case "loha":
            return LoHaConfig(r=settings.rank, alpha=settings.alpha, alpha_pattern=alphas, **common)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=adapter.dropout,
        alpha_pattern=alphas,
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
        init_lora_weights=_PISSA.get(adapter.init, True),
        **common,
    )


def _sum(adapter: AdapterSection, common: dict[str, Any]) -> LoraConfig:
    """s (B1 A1 + B2 A2) = s [B1 B2] [A1; A2]: a LoRA of rank r1 + r2, whose own scale is lora_alpha / rank."""

    settings: Any = adapter

    def lora_alpha(r1: int, r2: int, alpha: float) -> Any:
        return scale(alpha, r1, r2, settings.scale_exponent) * (r1 + r2)

    pairs = {name: rank if isinstance(rank, list) else [rank, rank] for name, rank in common["rank_pattern"].items()}
    alphas = {name: lora_alpha(pair[0], pair[1], settings.alpha) for name, pair in pairs.items()}
    alphas |= {name: lora_alpha(settings.r1, settings.r2, alpha) for name, alpha in adapter.alpha_pattern.items()}
    return LoraConfig(
        r=settings.r1 + settings.r2,
        lora_alpha=lora_alpha(settings.r1, settings.r2, settings.alpha),
        lora_dropout=adapter.dropout,
        alpha_pattern=alphas,
        **common | {"rank_pattern": {name: sum(pair) for name, pair in pairs.items()}},
    )


def method_of(config: PeftConfig) -> str:
    """PEFT's name of a configuration's method, whether it was read from a file or made here."""
    return PeftType(config.peft_type).value


def in_words(adapter: AdapterSection) -> str:
    """What is added to an adapted weight W0, with its ranks and scale, for people who read about a trained adapter."""
    if adapter.method == "full":
        return "dW, every number of which is trained"
    if adapter.pairs > 2 and adapter.scale_exponent is not None:
        return (
            f"s (B1 A1) * ... * (B{adapter.pairs} A{adapter.pairs}), each pair of rank {adapter.r1}, with "
            f"s = alpha^2 / r^{adapter.pairs * adapter.scale_exponent:g}, alpha = {adapter.alpha:g}"
        )
    if adapter.combine is not None:
        pairs = "(B1 A1) * (B2 A2)" if adapter.combine == "hadamard" else "(B1 A1 + B2 A2)"
        e = adapter.scale_exponent
        return (
            f"s {pairs}, with r1 = {adapter.r1}, r2 = {adapter.r2} and "
            f"s = alpha^2 / {'sqrt(r1 r2)' if e == 0.5 else f'(r1 r2)^{e:g}'}, alpha = {adapter.alpha:g}"
        )
    if adapter.method == "hira":
        return f"W0 * (B A), of rank {adapter.rank}"
    product = "(B1 A1) * (B2 A2)" if adapter.method == "loha" else "B A"
    scaled = f"alpha / {'sqrt(rank)' if adapter.method == 'rslora' else 'rank'}"
    if adapter.method == "pissa":
        return (
            f"s (B A - B0 A0), each product of rank {adapter.rank}, where B A started from B0 A0, the part of W0 with the "
            f"largest singular values, with s = alpha / rank, alpha = {adapter.alpha:g}"
        )
    after = ", then its rows get trained lengths" if adapter.method == "dora" else ""
    return f"s {product}, of rank {adapter.rank}, with s = {scaled}, alpha = {adapter.alpha:g}{after}"


def ranks_and_scale(config: PeftConfig, layer: str) -> tuple[int, int, float]:
    """r1, r2 and s of a layer, from a saved configuration; a method of one pair has r2 = 1."""
    ranks, alphas = (getattr(config, name, None) or {} for name in ("rank_pattern", "alpha_pattern"))
    key, alpha_key = (get_pattern_key(list(pattern), layer) for pattern in (ranks, alphas))
    match config:
        case AbbaConfig():
            r1, r2 = config.ranks_for(key)
            return r1, r2, scale(alphas.get(alpha_key, config.alpha), r1, r2, config.scale_exponent)
        case LoHaConfig():
            rank = ranks.get(key, config.r)
            return rank, rank, alphas.get(alpha_key, config.alpha) / rank
        case LoraConfig():
            rank = ranks.get(key, config.r)
            return rank, 1, alphas.get(alpha_key, config.lora_alpha) / (math.sqrt(rank) if config.use_rslora else rank)
        case HiraConfig():
            return ranks.get(key, config.r), 1, 1.0
        case ChainConfig():
            half = (config.pairs + 1) // 2
            return config.r**half, config.r ** (config.pairs - half), config.scaling
    raise TypeError(f"{type(config).__name__} is no method of {', '.join(CONFIGS)}")


def without_start(config: PeftConfig) -> None:
    """Have the factors start at random, without a look at the weight: for skeletons, and where they are about to be loaded."""
    for key in _STARTS:
        if hasattr(config, key):
            setattr(config, key, False)


def factor_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and layer of every layer that carries factors, in the model's order."""
    return [(name, one) for name, one in model.named_modules() if isinstance(one, BaseTunerLayer) and ranks_of(one)]


def ranks_of(layer: Any) -> dict[str, tuple[int, ...]]:
    """The ranks of a layer's pairs, by the adapter's name."""
    if isinstance(layer, AbbaLayer):
        return {name: (layer.r1[name], layer.r2[name]) for name in layer.r1}
    return {name: (rank,) for name, rank in layer.r.items()}


def is_factor(name: str, adapted: PeftModel) -> bool:
    """Whether a parameter belongs to the adapter's factors, by its name; else it is the base's, or trained whole."""
    return f".{adapted.base_model.prefix}" in name
