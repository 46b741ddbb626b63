"""What a run takes on each device, by use: what lies there all the time, and what one step adds to it."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import nn

from abba_cli.forecast.quantised import quantisable, quantised_bytes
from abba_cli.forecast.rehearsal import rehearse
from abba_cli.forecast.rows import HeavyRows
from abba_cli.forecast.tracker import GRADIENTS
from abba_cli.loss import keeps_logits
from abba_cli.methods import is_factor
from abba_cli.recipe import Recipe
from abba_cli.sharding import blocks
from abba_cli.zero import BUCKET

# Resident memory of a process that has imported torch, transformers, peft and datasets (measured, CPU build); a CUDA context
# takes about as much on its device.
RUNTIME_BYTES = 600_000_000
RUNTIME = "Python and libraries"
OPTIMIZER = "optimizer state"


@dataclass(frozen=True)
class Forecast:
    """The memory of a run at its peak, on each device.

    Attributes:
        uses: Bytes by use.
        largest_temporary: Bytes of the largest tensor that lives for an instant only.
        rows: Rows in a forward pass.
        tokens: Tokens in a forward pass, padding included.
        gap: Why the activations are missing from `uses`, where the model's step cannot be simulated; else empty.
    """

    uses: dict[str, int]
    largest_temporary: int
    rows: int
    tokens: int
    gap: str = ""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.uses.values())


def forecast(recipe: Recipe, skeleton: PeftModel, rows: HeavyRows, processes: int = 1, whole: bool = False) -> Forecast:
    """Foretell the peak of a run's memory on each device.

    Args:
        recipe: The recipe.
        skeleton: The base's skeleton with the adapter on it.
        rows: The training data.
        processes: Processes that train together, each on a device of its own.
        whole: Simulate every block, to check that one of each kind says the same.
    """
    uses = {RUNTIME: RUNTIME_BYTES, **_standing(recipe, skeleton, processes)}
    batch = rows.batch(recipe, keeps_logits(skeleton.get_base_model()))
    result = partial(Forecast, rows=recipe.training.batch_size, tokens=batch["input_ids"].numel())
    try:
        step = rehearse(recipe, skeleton, batch, whole)
    except RuntimeError as error:  # what every refusal of fake tensors is: code that looks at values, or reaches past PyTorch
        return result(uses, largest_temporary=0, gap=" ".join(str(error).split())[:200])
    by_deepspeed = recipe.distributed.strategy == "deepspeed" and processes > 1
    gradients = math.ceil(sum(_trained_bytes(recipe, skeleton)) / (processes if by_deepspeed else 1))
    if by_deepspeed:  # each bucket of gradients is shared out before the next one is full
        step.peak[GRADIENTS] = min(step.peak.get(GRADIENTS, 0), gradients)
    # All gradients are there at the end of a step, and only then when each step has one backward pass.
    ending = 0 if recipe.training.gradient_accumulation > 1 else gradients
    if recipe.training.gradient_accumulation > 1:
        uses[GRADIENTS] = gradients
    added = step.peak if sum(step.peak.values()) > ending else {GRADIENTS: ending}
    return result(uses | {use: uses.get(use, 0) + size for use, size in added.items()}, step.largest_temporary)


def _standing(recipe: Recipe, skeleton: PeftModel, processes: int) -> dict[str, int]:
    """Bytes by use that lie on the device from the first step to the last."""
    trained = sum(_trained_bytes(recipe, skeleton))
    standing = {**_base(recipe, skeleton, processes), "trained weights": trained, OPTIMIZER: _state(recipe, skeleton)}
    if recipe.distributed.strategy == "deepspeed" and processes > 1:
        elsewhere = recipe.distributed.offload and torch.cuda.is_available()
        # Beside the state, DeepSpeed has its own copy of what is trained, in shares.
        standing[OPTIMIZER] = 0 if elsewhere else math.ceil((standing[OPTIMIZER] + trained) / processes)
        standing["buckets of gradients"] = 4 * BUCKET
    elif processes > 1:
        standing["buckets of gradients"] = trained  # DistributedDataParallel sends copies
    return standing


def _base(recipe: Recipe, skeleton: PeftModel, processes: int) -> dict[str, int]:
    """The base on each device: whole, or a share of it and the blocks that are gathered at one time."""
    shared, kept = _frozen_bytes(recipe, skeleton, skeleton)
    if not recipe.distributed.shares_base or processes == 1:
        return {"base weights": shared + kept}
    each = [_frozen_bytes(recipe, skeleton, block)[0] for block in blocks(skeleton.get_base_model())]
    # FSDP fetches the next block while one is at work, and keeps what stands outside of the blocks from forward to backward.
    gathered = 2 * max(each) + shared - sum(each)
    elsewhere = recipe.distributed.offload and torch.cuda.is_available()
    return {"share of the base": (0 if elsewhere else math.ceil(shared / processes)) + kept, "gathered blocks": gathered}


def _frozen_bytes(recipe: Recipe, skeleton: PeftModel, within: nn.Module) -> tuple[int, int]:
    """Bytes of a module's frozen parameters, and of what belongs to them and is never shared out: buffers, scales of 4 bits."""
    weights = sum(_bytes(one) for one in within.parameters() if not one.requires_grad)
    others = sum(_bytes(one) for one in within.buffers())
    kind = recipe.model.quantization
    if kind != "none":
        inside = set(within.modules())
        for layer in (layer for _, layer in quantisable(skeleton) if layer in inside):
            values = (layer.weight.numel() + 1) // 2 if kind == "nf4" else layer.weight.numel()
            weights += values - _bytes(layer.weight)
            others += quantised_bytes(layer, kind) - values
    return weights, others


def _trained_bytes(recipe: Recipe, skeleton: PeftModel) -> list[int]:
    """Bytes of every trained parameter; the type of the factors is the recipe's, whatever the skeleton was made with."""
    size = getattr(torch, recipe.adapter.dtype).itemsize
    named = [(name, one) for name, one in skeleton.named_parameters() if one.requires_grad]
    return [one.numel() * (size if is_factor(name, skeleton) else one.element_size()) for name, one in named]


def _state(recipe: Recipe, skeleton: PeftModel) -> int:
    trained = [one.numel() for one in skeleton.parameters() if one.requires_grad]
    if recipe.training.optimizer == "adamw":
        return 2 * sum(_trained_bytes(recipe, skeleton)) + 4 * len(trained)  # and a counter each
    return sum(_state_8bit(count) for count in trained) + 2 * 4 * 256


def _state_8bit(count: int) -> int:
    """bitsandbytes keeps two bytes for a value and two scales for 256 of them; small tensors stay in float32."""
    return 2 * 4 * count if count < 4096 else 2 * count + 2 * 4 * math.ceil(count / 256)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
