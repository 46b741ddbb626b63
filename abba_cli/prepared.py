"""What the data rooms hand to training: tokenised rows, what became of every source, and examples to look at."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from abba_cli.prompts import Template


@dataclass(frozen=True)
class SourceAudit:
    """What became of one source's rows.

    Attributes:
        path: The source as the recipe names it.
        split: Its split.
        shape: How its rows are read.
        unused_columns: Columns that are not read.
        sha256: Digest of each file read, by path; empty for a hub data set.
        rows_found: Rows after split and max_rows.
        rows: Rows used, after weight and dropping.
        tokens: Tokens of the rows used.
        supervised_tokens: Tokens on which the loss is taken.
        truncated_rows: Rows cut at max_length_tokens.
        unsupervised_rows: Rows dropped because nothing in them is supervised.
        longest_row_tokens: Tokens of the longest row before cutting.
    """

    path: str
    split: str
    shape: str
    unused_columns: tuple[str, ...]
    sha256: dict[str, str]
    rows_found: int
    rows: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    unsupervised_rows: int
    longest_row_tokens: int


@dataclass(frozen=True)
class SplitAudit:
    """What became of the training or the evaluation rows.

    Attributes:
        sources: One audit a source, in the recipe's order.
        packed_sequences: Sequences after packing; None without packing.
    """

    sources: tuple[SourceAudit, ...]
    packed_sequences: int | None

    @property
    def rows(self) -> int:
        """Rows used, of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of the rows used."""
        return sum(source.tokens for source in self.sources)

    @property
    def supervised_share(self) -> float:
        """Share of the tokens on which the loss is taken."""
        return sum(source.supervised_tokens for source in self.sources) / self.tokens

    @property
    def truncated_rows(self) -> int:
        """Rows cut at max_length_tokens."""
        return sum(source.truncated_rows for source in self.sources)

    @property
    def longest_row_tokens(self) -> int:
        """Tokens of the longest row before cutting."""
        return max(source.longest_row_tokens for source in self.sources)


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered row: its text, and whether the loss is taken on it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt of an evaluation source, to be answered during training.

    Attributes:
        source: Path of its source.
        row: Its number there, from 0.
        text: What the model is given.
        input_ids: The same as tokens.
        reference: The answer of the data set.
    """

    source: str
    row: int
    text: str
    input_ids: tuple[int, ...]
    reference: str


@dataclass(frozen=True)
class PreparedData:
    """Everything that training needs to know of the data.

    Attributes:
        train: Columns input_ids and labels (-100 where unsupervised); document_lengths besides when packed.
        eval: The same for the held-out rows; None without eval sources.
        audit: By split name, `train` and (if there is one) `eval`.
        fingerprint: SHA-256 over the ids and labels of the training rows, then of the held-out rows, in order.
        template: The prompt template used.
        first_row: The first training row as it was found.
        first_spans: The same row as the model sees it.
        held_out: Prompts for sample generations.
    """

    train: Dataset
    eval: Dataset | None
    audit: dict[str, SplitAudit]
    fingerprint: str
    template: Template
    first_row: dict[str, Any]
    first_spans: tuple[Span, ...]
    held_out: tuple[HeldOutPrompt, ...]
