"""One forward, loss and backward on a stand-in, and from it the bytes of the same step on the whole model."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from abba_cli.forecast.stand_in import StandIn, base_of, stand_in
from abba_cli.forecast.tracker import GRADIENTS, HEAD, TEMPORARIES, Segment, Tracker
from abba_cli.head import Head, separable_head
from abba_cli.loss import training_loss
from abba_cli.recipe import Recipe


@dataclass(frozen=True)
class Rehearsal:
    """What a forward and backward pass adds to what lay there before it.

    Attributes:
        peak: Bytes by use when they were most.
        largest_temporary: Bytes of the largest tensor that lives for an instant.
    """

    peak: dict[str, int]
    largest_temporary: int


def rehearse(recipe: Recipe, skeleton: PeftModel, batch: Mapping[str, Any], whole: bool = False) -> Rehearsal:
    """Go through the forward pass, the loss and the backward pass of one batch, without memory.

    Args:
        recipe: The recipe.
        skeleton: The adapted skeleton.
        batch: What the collator makes of the rows; real tensors, whose values say where the loss is taken.
        whole: Simulate every block, to check that the shorter way says the same.
    """
    head = None if recipe.training.compile else separable_head(base_of(skeleton))
    with FakeTensorMode(allow_non_fake_inputs=True):
        double = stand_in(recipe, skeleton, whole)
        if head is not None:
            base = base_of(double.model)
            head = Head(base.get_output_embeddings(), base.config.get_text_config())  # type: ignore[no-untyped-call]
        tracker = Tracker()
        for parameter in double.model.parameters():
            tracker.ignore(parameter)
        if recipe.training.gradient_accumulation > 1:
            for parameter in double.model.parameters():
                if parameter.requires_grad:  # left by the batches before
                    parameter.grad = torch.empty_like(parameter)
                    tracker.ignore(parameter.grad)
        _mark(tracker, double)
        with tracker:
            _step(tracker, double.model, batch, head)
            for parameter in double.model.parameters():
                if parameter.grad is not None:
                    tracker.relabel(parameter.grad, GRADIENTS)
            segments = tracker.segments()
    return Rehearsal(_peak(segments, double.sequence), tracker.largest(TEMPORARIES))


def _step(tracker: Tracker, model: PeftModel, batch: Mapping[str, Any], head: Head | None) -> None:
    loss = training_loss(model, batch, len(batch["targets"]), head)
    if tracker.stretch == "start":
        tracker.stretch, tracker.use = "head", HEAD
    loss.backward()  # type: ignore[no-untyped-call]
    tracker.stretch = "end"


def _mark(tracker: Tracker, double: StandIn) -> None:
    """Have the stretches of the step begin where a block's forward or backward pass begins."""
    last = len(double.blocks) - 1
    for number, block in enumerate(double.blocks):
        block.register_forward_pre_hook(_before_block(tracker, number))
        block.register_forward_hook(_after_block(tracker, number, number == last))
        for name, part in block.named_children():
            _scope(tracker, part, _use(name, part))


def _before_block(tracker: Tracker, number: int) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        if not tracker.stretch.startswith("backward"):  # else it is computed again
            tracker.stretch, tracker.use = f"forward {number}", "activations: residual stream"

    return hook


def _after_block(tracker: Tracker, number: int, last: bool) -> Any:
    def backward(gradient: Tensor) -> None:
        tracker.stretch, tracker.use = f"backward {number}", TEMPORARIES

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if tracker.stretch.startswith("backward"):
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(backward)
        if last:
            tracker.turn_to("head", HEAD)

    return hook


def _scope(tracker: Tracker, part: nn.Module, use: str) -> None:
    tokens: list[tuple[str, int]] = []
    part.register_forward_pre_hook(lambda module, args: tokens.append(tracker.enter(use)))
    # Checkpointing ends a second forward pass as soon as it has what it needs, by an exception.
    part.register_forward_hook(lambda module, args, output: tracker.leave(tokens.pop()), always_call=True)


def _use(name: str, part: nn.Module) -> str:
    named = f"{name} {type(part).__name__}".lower()
    if "attn" in named or "attention" in named:
        return "activations: attention"
    if "norm" in named or name.startswith("ln"):
        return "activations: norms"
    return "activations: MLP" if any(one.dim() > 1 for one in part.parameters()) else "activations: residual stream"


def _peak(segments: dict[str, Segment], sequence: list[int]) -> dict[str, int]:
    """Put the stretches of all blocks in a row, and find where most bytes lie."""
    stretches = ["start", *(f"forward {number}" for number in sequence), "head"]
    stretches += [*(f"backward {number}" for number in reversed(sequence)), "end"]
    now: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    for stretch in stretches:
        segment = segments.get(stretch)
        if segment is None:
            continue
        if sum(now.values()) + segment.height > sum(peak.values()):
            peak = now.copy()
            peak.update(segment.peak)
        now.update(segment.net)
    return {use: size for use, size in peak.items() if size}
