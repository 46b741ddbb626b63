"""Does a merged checkpoint answer like base + adapter? A few prompts through both, in float32 where memory allows."""

import gc
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from abba_cli.bases import Base
from abba_cli.errors import ModelError
from abba_cli.events import Listener, Stage
from abba_cli.hub import explain, no_progress_bars
from abba_cli.loading import load_model
from abba_cli.memory import available_memory
from abba_cli.merge.tensors import Quantised
from abba_cli.methods import factor_layers
from abba_cli.recipe import ModelSection
from abba_cli.saved_adapter import SavedAdapter

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at 100 degrees Celsius because",
)
# Largest difference of a logit, as a share of the logits' standard deviation, from a model whose weights are rounded alike. What
# is measured is 2e-5 and less; one layer left out of 210 makes 4e-3 to 0.2 (benchmarks/LOG.md).
TOLERANCE = 1e-3
# Against a base in 4 or 8 bits, which computes in its own type: 0.14 was measured for nf4 in bfloat16.
TOLERANCE_QUANTISED = 0.5


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Args:
        positions: Positions compared, over all prompts.
        difference: Largest difference of a logit from base + adapter, as a share of the logits' standard deviation: what rounding
            the weights to the checkpoint's type does.
        agreement: Share of positions where both have the same most likely next token.
        rounded_alike: The largest difference from base + adapter with weights rounded as the checkpoint's are; None for a base in
            4 or 8 bits.
        tolerance: The bound on it, or without it on `difference`.
    """

    positions: int
    difference: float
    agreement: float
    rounded_alike: float | None
    tolerance: float


def verify_merge(
    adapters: Sequence[tuple[SavedAdapter, float]],
    base: Base,
    merged: Path,
    dtypes: Mapping[str, torch.dtype],
    parameters: int,
    quantised: Quantised | None,
    asked: bool | None,
    listen: Listener,
) -> tuple[Verification | None, str]:
    """Compare a merged checkpoint with its base and adapters.

    Args:
        adapters: With their weights.
        base: Where it is read from.
        merged: The folder of the merged checkpoint.
        dtypes: Of its tensors, by the parameters' names.
        parameters: Their number, to tell whether a model fits into memory.
        quantised: How training saw the base, if that was merged.
        asked: True when the user insists; None leaves it out where it does not fit.
        listen: Called with events.

    Returns:
        What was found, or None and the reason why nothing was compared.

    Raises:
        ModelError: The models differ by more than the tolerance.
    """
    if any(adapter.whole for adapter, _ in adapters) and (len(adapters) > 1 or adapters[0][1] != 1.0):
        return None, "PEFT has no weighted sum of modules that were trained whole, so there is nothing to compare with"
    if any(adapter.update != "added" for adapter, _ in adapters) and (len(adapters) > 1 or adapters[0][1] != 1.0):
        return None, "PEFT has no weighted sum of updates that are not added (HiRA, DoRA), so there is nothing to compare with"
    device = PartialState().device
    room = available_memory(device)
    narrowest = max(dtypes.values(), key=lambda dtype: torch.finfo(dtype).eps)
    compute = torch.float32 if room > parameters * 4 * 1.2 else narrowest
    if asked is None and room <= parameters * compute.itemsize * 1.2:
        needed = parameters * compute.itemsize * 1.2
        return None, f"the model does not fit into memory ({room / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed)"
    with no_progress_bars(), torch.no_grad():
        listen(Stage("Verifying: base + adapter"))
        expected, alike, tokens = _reference(adapters, base, compute, quantised, dtypes)
        listen(Stage("Verifying: merged model"))
        found = _logits(_load(merged, compute, device), tokens)
    if not bool(expected.isfinite().all() and found.isfinite().all()):
        raise ModelError(
            "base + adapter or the merged model gives logits that are no numbers, so nothing was written: the update is too "
            "large; look at the adapter's training and at --weight"
        )
    result = compare(expected, alike, found)
    decisive = result.difference if result.rounded_alike is None else result.rounded_alike
    if not decisive <= result.tolerance:
        raise ModelError(
            f"the merged model does not answer like base + adapter: logits differ by {decisive:.2%} of their spread (at most "
            f"{result.tolerance:.1%} is allowed), and {result.agreement:.1%} of the next tokens agree; nothing was written. "
            "This is a bug worth reporting; --no-verify writes the checkpoint all the same"
        )
    return result, ""


def compare(expected: torch.Tensor, alike: torch.Tensor | None, found: torch.Tensor) -> Verification:
    """Compare logits, each (positions, vocabulary)."""
    agreement = float((expected.argmax(-1) == found.argmax(-1)).float().mean())
    return Verification(
        positions=len(expected),
        difference=_difference(found, expected),
        agreement=agreement,
        rounded_alike=None if alike is None else _difference(found, alike),
        tolerance=TOLERANCE_QUANTISED if alike is None else TOLERANCE,
    )


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def _reference(
    adapters: Sequence[tuple[SavedAdapter, float]],
    base: Base,
    compute: torch.dtype,
    quantised: Quantised | None,
    dtypes: Mapping[str, torch.dtype],
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """Logits of base + adapters, the same with weights rounded as in the checkpoint, and the prompts' tokens."""
    if quantised is None:
        model: Any = _load(Path(base.location), compute, PartialState().device, base.keywords())
    else:
        number = str(quantised.dtype).removeprefix("torch.")
        settings = {"name": base.location, "revision": base.revision, "dtype": number, "quantization": quantised.quantization}
        model = load_model(base, ModelSection.model_validate(settings))
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, (adapter, _) in zip(names, adapters, strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter.path), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(adapter.path), adapter_name=name)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    for _, layer in factor_layers(model):
        for name, (_, weight) in zip(names, adapters, strict=True):
            if weight != 1.0 and name in layer.scaling:
                layer.scaling[name] *= weight
    model.eval()
    with explain(f"tokenizer of {base.location}"):
        tokenizer = AutoTokenizer.from_pretrained(base.location, **base.keywords())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [tokenizer(prompt, return_tensors="pt").input_ids % vocabulary for prompt in PROMPTS]
    expected, alike = _logits(model, tokens), None
    if quantised is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")  # as in the checkpoint
            model = model.merge_and_unload(adapter_names=names)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.to(dtypes.get(name, parameter.dtype)).to(compute)
        alike = _logits(model, tokens)
    del model
    gc.collect()
    return expected, alike, tokens


def _load(folder: Path, dtype: torch.dtype, device: torch.device, keywords: dict[str, Any] | None = None) -> PreTrainedModel:
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    with explain(f"model {folder}"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **place, **(keywords or {}))
    model.train(False)
    return model


def _logits(model: Any, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits of every position of all prompts, (positions, vocabulary) in float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    return torch.cat([model(input_ids=one.to(device)).logits[0].float().cpu() for one in tokens])
