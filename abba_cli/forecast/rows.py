"""The heaviest batch that the training data can make: no batch of the run takes more memory."""

from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow
from datasets import Dataset

from abba_cli.batches import IGNORED, PackedBatches, PaddedBatches
from abba_cli.loss import SupervisedBatches
from abba_cli.recipe import Recipe


@dataclass(frozen=True)
class HeavyRows:
    """The training rows, heaviest first.

    Attributes:
        table: Columns input_ids and labels, and document_lengths where the rows are packed.
        order: Row numbers: the longest row, then those on which most is learned.
        longest: Tokens of the longest row.
    """

    table: pyarrow.Table
    order: tuple[int, ...]
    longest: int

    def batch(self, recipe: Recipe, keeps_logits: bool) -> dict[str, Any]:
        """The heaviest batch of the recipe's size and length, as its collator makes it.

        Args:
            recipe: The recipe.
            keeps_logits: Whether the model takes logits_to_keep.
        """
        numbers = [self.order[index % len(self.order)] for index in range(recipe.training.batch_size)]
        rows = [_cut(self.table.slice(number, 1).to_pylist()[0], recipe.data.max_length_tokens) for number in numbers]
        # Which token fills up a batch makes no difference to its size.
        collate = PackedBatches() if recipe.data.packing else PaddedBatches(pad_id=0)
        return SupervisedBatches(collate, keeps_logits)(rows)


def heavy_rows(train: Dataset, most: int = 4096) -> HeavyRows:
    """Put the heaviest training rows first, without reading more than the lengths of all.

    Args:
        train: Columns input_ids and labels.
        most: Rows to keep; a larger batch repeats them.
    """
    table = train.data.table
    labels = table.column("labels").combine_chunks()
    starts = labels.offsets.to_numpy()[:-1] - labels.offsets[0].as_py()
    learned = numpy.add.reduceat(labels.flatten().to_numpy() != IGNORED, starts, dtype=numpy.int64)
    lengths = labels.value_lengths().to_numpy()
    longest = int(lengths.argmax())
    rest = [int(number) for number in numpy.argsort(-learned, kind="stable")[:most] if number != longest]
    return HeavyRows(table, (longest, *rest), int(lengths[longest]))


def _cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    """The first tokens of a row, for a recipe with a shorter limit than the data was prepared with."""
    cut = {key: row[key][:length] for key in ("input_ids", "labels")}
    if "document_lengths" in row:
        left, documents = length, []
        for document in row["document_lengths"]:
            documents.append(min(document, left))
            left -= documents[-1]
        cut["document_lengths"] = [document for document in documents if document]
    return cut
