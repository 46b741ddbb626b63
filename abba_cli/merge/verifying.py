"""Does a merged checkpoint answer like base + adapter? A few prompts through both, in float32 where memory allows."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from abba_cli.adapter import AbbaLayer
from abba_cli.bases import Base
from abba_cli.errors import ModelError
from abba_cli.events import Listener, Stage
from abba_cli.hub import explain, no_progress_bars
from abba_cli.loading import load_model
from abba_cli.memory import available_memory
from abba_cli.merge.tensors import Quantised
from abba_cli.recipe import ModelSection
from abba_cli.saved_adapter import SavedAdapter

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at 100 degrees Celsius because",
)
# Largest difference of a logit, as a share of the logits' standard deviation. What the rounding of the weights alone does is
# measured in benchmarks/LOG.md, "What a merge may change"; the bounds are about ten times that.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Args:
        positions: Positions compared, over all prompts.
        largest_difference: Of any logit.
        relative_difference: The same as a share of the logits' standard deviation.
        tolerance: The bound on the relative difference.
        agreement: Share of positions where both models have the same most likely next token.
    """

    positions: int
    largest_difference: float
    relative_difference: float
    tolerance: float
    agreement: float


def verify_merge(
    adapters: Sequence[tuple[SavedAdapter, float]],
    base: Base,
    merged: Path,
    dtype: torch.dtype,
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
        dtype: Of its weights, which sets the tolerance.
        parameters: Its number of parameters, to tell whether a model fits into memory.
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
    device = PartialState().device
    room = available_memory(device)
    compute = torch.float32 if room > parameters * 4 * 1.2 else dtype
    if asked is None and room <= parameters * compute.itemsize * 1.2:
        needed = parameters * compute.itemsize * 1.2
        return None, f"the model does not fit into memory ({room / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed)"
    with no_progress_bars(), torch.no_grad():
        listen(Stage("Verifying: base + adapter"))
        expected, tokens = _reference(adapters, base, compute, quantised)
        listen(Stage("Verifying: merged model"))
        model = _load(merged, compute, device)
        found = _logits(model, tokens)
    result = compare(expected, found, TOLERANCE[dtype])
    if not result.relative_difference <= result.tolerance:
        raise ModelError(
            f"the merged model does not answer like base + adapter: logits differ by up to {result.largest_difference:.3g} "
            f"({result.relative_difference:.1%} of their spread, at most {result.tolerance:.1%} is allowed in "
            f"{str(dtype).removeprefix('torch.')}), and {result.agreement:.1%} of the next tokens agree; nothing was written. "
            "Try --dtype float32; if that differs too, this is a bug worth reporting"
        )
    return result, ""


def compare(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], tolerance: float) -> Verification:
    """Compare logits, each (positions, vocabulary), prompt by prompt."""
    a, b = torch.cat(list(expected)), torch.cat(list(found))
    difference = float((a - b).abs().max())
    if not bool(a.isfinite().all() and b.isfinite().all()):
        difference = float("inf")
    agreement = float((a.argmax(-1) == b.argmax(-1)).float().mean())
    return Verification(a.shape[0], difference, difference / float(a.std()), tolerance, agreement)


def _reference(
    adapters: Sequence[tuple[SavedAdapter, float]], base: Base, compute: torch.dtype, quantised: Quantised | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    device = PartialState().device
    if quantised is None:
        model: Any = _load(Path(base.location), compute, device, base.keywords())
    else:
        section = ModelSection.model_validate(
            {
                "name": base.location,
                "revision": base.revision,
                "dtype": str(quantised.dtype).removeprefix("torch."),
                "quantization": quantised.quantization,
            }
        )
        model = load_model(base, section)
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, (adapter, _) in zip(names, adapters, strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter.path), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(adapter.path), adapter_name=name)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, AbbaLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                module.set_scale(name, weight)
    model.eval()
    tokenizer = None
    with explain(f"tokenizer of {base.location}"):
        tokenizer = AutoTokenizer.from_pretrained(base.location, **base.keywords())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [tokenizer(prompt, return_tensors="pt").input_ids % vocabulary for prompt in PROMPTS]
    logits = _logits(model, tokens)
    del model
    gc.collect()
    return logits, tokens


def _load(folder: Path, dtype: torch.dtype, device: torch.device, keywords: dict[str, Any] | None = None) -> PreTrainedModel:
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    with explain(f"model {folder}"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **place, **(keywords or {}))
    model.train(False)
    return model


def _logits(model: Any, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of every position of every prompt, (positions, vocabulary) in float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    return [model(input_ids=one.to(device)).logits[0].float().cpu() for one in tokens]
