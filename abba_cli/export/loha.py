"""An ABBA adapter as a standard LoHa adapter of PEFT, which is the same function with one rank for both pairs.

Shapes: W0 is (m, n); hada_w1_a and hada_w1_b are B1 (m, r1) and A1 (r1, n), hada_w2_a and hada_w2_b are B2 and A2, the pair of
smaller rank padded with zeros to r = max(r1, r2); LoHa's scale is alpha / r.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoHaConfig
from safetensors.torch import save_file

from abba_cli.errors import ModelError
from abba_cli.export.lora import Dtype, common_settings, rounded
from abba_cli.recorded_base import LayerKind
from abba_cli.rundir import ADAPTER_FILES
from abba_cli.saved_adapter import SavedAdapter


def write_loha(adapter: SavedAdapter, folder: Path, kinds: Mapping[str, LayerKind], dtype: Dtype = "float32") -> None:
    """Write a LoHa adapter that stock PEFT loads. The factors are ABBA's own, bit for bit where the dtype is theirs.

    Args:
        adapter: The adapter.
        folder: A directory.
        kinds: How each layer stores its weight, from `recorded_base.fit`.
        dtype: Of the factors in the file; parameters that were trained whole keep their own.

    Raises:
        ModelError: PEFT's LoHa cannot express the adapter: a layer is transposed (GPT-2's Conv1D) or a convolution, or biases
            were trained; or a factor has values that `dtype` cannot hold.
    """
    _refuse_what_loha_lacks(adapter, kinds)
    ranks = {name: max(layer.r1, layer.r2) for name, layer in adapter.layers.items()}
    alphas = {name: layer.s * ranks[name] for name, layer in adapter.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    LoHaConfig(
        r=int(rank),
        alpha=alpha,  # type: ignore[arg-type]  # annotated as int, used as a float
        rank_pattern={_exactly(name): one for name, one in ranks.items() if one != rank},
        alpha_pattern={_exactly(name): one for name, one in alphas.items() if one != alpha},
        **common_settings(adapter),
    ).save_pretrained(str(folder))
    tensors = {key: adapter.parameter(name) for name, key in adapter.whole.items()}
    for name in adapter.layers:
        B1, A1, B2, A2 = (rounded(name, factor, dtype) for factor in adapter.factors(name))
        for letter, B, A in (("1", B1, A1), ("2", B2, A2)):
            missing = ranks[name] - A.shape[0]
            tensors[f"base_model.model.{name}.hada_w{letter}_a"] = torch.nn.functional.pad(B, (0, missing)).contiguous()
            tensors[f"base_model.model.{name}.hada_w{letter}_b"] = torch.nn.functional.pad(A, (0, 0, 0, missing)).contiguous()
    save_file(tensors, folder / ADAPTER_FILES[1], metadata={"format": "pt"})


def _refuse_what_loha_lacks(adapter: SavedAdapter, kinds: Mapping[str, LayerKind]) -> None:
    what = {"transposed": "a transposed layer (Conv1D, as in GPT-2)", "convolution": "a convolution"}
    for name, kind in kinds.items():
        if kind in what:
            raise ModelError(
                f"{adapter.path}: {name} is {what[kind]}, which PEFT's LoHa does not adapt; use `--format lora` for Conv1D, or "
                "`abba merge` for the whole model"
            )
    saved = adapter.config.modules_to_save or []
    biases = [name for name in adapter.whole if name.endswith(".bias") and not any(f".{one}." in f".{name}" for one in saved)]
    if biases:
        raise ModelError(
            f"{adapter.path} has trained biases, such as {biases[0]}, which PEFT's LoHa has no place for; use `--format lora` or "
            "`abba merge`"
        )


def _exactly(name: str) -> str:
    """A key of PEFT's rank_pattern and alpha_pattern that matches this module alone; PEFT matches ends of names otherwise."""
    return "^" + name.replace(".", r"\.")
