"""The loss, computed from the logits of supervised positions alone.

The logits of a token that nothing is learned from cost as much as any other: a vocabulary of 49,152 makes the head a fifth of
SmolLM2's arithmetic. Models of transformers leave positions out when they are given `logits_to_keep`.

Shapes: B rows, T tokens, K kept positions, V vocabulary.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from abba_cli.batches import IGNORED

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Makes a batch of prepared rows."""


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model can leave out logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@dataclass(frozen=True)
class SupervisedBatches:
    """Collator that tells the model which positions' logits the loss will want.

    Attributes:
        collate: The collator that makes the batch.
    """

    collate: Collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch with logits_to_keep, int64 [K], added."""
        batch = self.collate(rows)
        return {**batch, "logits_to_keep": kept_positions(batch["labels"])}


def kept_positions(labels: Tensor) -> Tensor:
    """Positions [K] at which any row [B, T] has a supervised next token."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]


def supervised_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the next token, summed over supervised tokens and divided by their number.

    Args:
        outputs: The model's output; its logits are [B, K, V] or, from a model that keeps all, [B, T, V].
        labels: [B, T], -100 where unsupervised.
        num_items_in_batch: Supervised tokens of the whole optimizer step, so that accumulation does not change the loss.

    Returns:
        A scalar in nats.
    """
    losses, mask = token_losses(outputs.logits, labels)
    return losses.sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and number of supervised tokens of every row, both float32 [B]."""
    losses, mask = token_losses(logits, labels)
    sums = torch.zeros(len(labels), device=losses.device).index_add_(0, mask.nonzero()[:, 0], losses)
    return sums, mask.sum(1).float()


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 loss of every supervised token, in order, and the mask [B, K] that says which they are."""
    kept = kept_positions(labels)
    targets = labels[:, kept + 1]
    if logits.shape[1] != len(kept):
        logits = logits[:, kept]
    mask = targets != IGNORED
    return functional.cross_entropy(logits[mask].float(), targets[mask], reduction="none"), mask
