"""The loss of supervised tokens, and of them alone: one forward pass for training, one for evaluation.

The logits of a token that nothing is learned from cost as much as any other: a vocabulary of 49,152 makes the head a fifth of
SmolLM2's arithmetic. Which tokens are supervised is worked out where the batch is made, so that a GPU is never waited for.

Shapes: B rows, T tokens, K kept positions, S supervised tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from abba_cli.batches import IGNORED
from abba_cli.head import Head, head_losses, left_out

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Makes a batch of prepared rows."""

_NOT_FOR_THE_MODEL = {"labels", "supervised", "targets", "tokens"}


def training_loss(model: nn.Module, batch: Mapping[str, Any], items: Tensor | int | None, head: Head | None) -> Tensor:
    """Cross-entropy of the next token, summed over the batch's supervised tokens and divided by `items`.

    Args:
        model: The model, in whatever wrapper trains it.
        batch: Of SupervisedBatches, on the model's device.
        items: Supervised tokens of the whole optimizer step, so that accumulation does not change the loss; None takes those of
            the batch.
        head: What `head.separable_head` found; None takes the loss from the model's own logits.

    Returns:
        A scalar in nats.
    """
    losses = token_losses(model, batch, head)
    return losses.sum() / (len(losses) if items is None else items)


def row_losses(model: nn.Module, batch: Mapping[str, Any], head: Head | None) -> tuple[Tensor, Tensor]:
    """Summed loss and number of supervised tokens of every row, both float32 [B]; arguments as of `training_loss`."""
    losses = token_losses(model, batch, head)
    count, length = batch["labels"].shape
    rows = batch["supervised"] // (len(batch["logits_to_keep"]) if "logits_to_keep" in batch else length)
    sums, counts = (losses.new_zeros(count).index_add_(0, rows, values) for values in (losses, torch.ones_like(losses)))
    return sums, counts


def token_losses(model: nn.Module, batch: Mapping[str, Any], head: Head | None) -> Tensor:
    """Loss of every supervised token, float32 [S]; arguments as of `training_loss`."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL} | {"use_cache": False}
    if head is None:
        logits = _supervised(model(**inputs).logits, batch)
        return functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), batch["targets"], reduction="none"
        )
    with left_out(head):
        hidden = _supervised(model(**inputs).logits, batch)
    return head_losses(hidden, batch["targets"], head)


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model can leave out positions after its last block."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@dataclass(frozen=True)
class SupervisedBatches:
    """Collator that says which tokens the loss is taken of.

    Attributes:
        collate: The collator that makes the batch.
        keep: Whether the model takes logits_to_keep, as `keeps_logits` says.
    """

    collate: Collator
    keep: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch and what the loss needs.

        Returns:
            The batch without its mask: padding stands behind a row, where no token of a causal model looks, and attention
            without a mask is faster. Besides: supervised, int64 [S], numbers of the supervised positions in the model's flattened
            output; targets, int64 [S], the tokens to foretell there; tokens, the number of tokens that are no padding; and
            logits_to_keep, int64 [K], the positions at which any row is supervised, where the model takes it.
        """
        batch = self.collate(rows)
        following = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        kept = (following != IGNORED).any(0).nonzero()[:, 0]
        if self.keep:
            batch["logits_to_keep"] = kept
            following = following[:, kept]
        batch["supervised"] = (following.flatten() != IGNORED).nonzero()[:, 0]
        batch["targets"] = following.flatten()[batch["supervised"]]
        mask = batch.pop("attention_mask", None)
        batch["tokens"] = batch["input_ids"].numel() if mask is None else int(mask.sum())
        return batch


def _supervised(outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The supervised positions, [S, :], of a model's outputs [B, K or T, :]."""
    return outputs.flatten(0, 1).index_select(0, batch["supervised"])
