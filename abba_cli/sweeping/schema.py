"""The schema of a sweep file: a base recipe, what is varied, and how the runs are compared."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from abba_cli.recipe_section import Section, Text

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _as_number(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for text, for want of a dot and a sign; a figure needs the number."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


Values = dict[Text, Any]
Choices = dict[Text, Annotated[list[Annotated[Any, BeforeValidator(_as_number)]], Field(min_length=1)]]


class TuneSection(Section):
    """Short runs that choose some keys for each variant, by the lowest evaluation loss."""

    values: Choices = Field(min_length=1, description="Dotted key of the recipe to the values that are tried, all combinations.")
    set: Values = Field({}, description="Keys of the tuning runs alone, such as fewer steps and other held-out rows.")
    seed: int | None = Field(None, ge=0, description="Of the tuning runs; null is the first of `seeds`.")


class VariantSection(Section):
    """One of the things that are compared."""

    set: Values = Field({}, description="Dotted keys of the recipe to this variant's values.")
    tune: Choices | None = Field(None, description="Values that this variant tries, in place of `tune.values`.")


class EvaluateSection(Section):
    """What `abba eval` scores each trained adapter on."""

    tasks: Annotated[list[Text], Field(min_length=1)] = Field(description="Names, groups or task files.")
    limit: int | None = Field(None, ge=1, description="Only the first N rows of each task.")
    batch_size: int | None = Field(None, ge=1, description="Prompts at a time; null is auto.")


class SweepFile(Section):
    """A sweep. Keys of the recipe are set in this order: `set`, the variant's, the grid's, the seed, what was tuned, `--set`."""

    base: Text = Field(description="The recipe, relative to this file.")
    output: Text = Field(description="Folder of the runs and the report; relative to the current directory.")
    data_dir: Text | None = Field(
        None,
        description="What {data_dir} stands for in values, and where local data of `evaluate` lies; relative to the current "
        "directory. `--data-dir` goes before it.",
    )
    set: Values = Field({}, description="Dotted keys of the recipe, for all runs.")
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field([42], description="A run for each.")
    variants: dict[Text, VariantSection] = Field({}, description="Name to keys: what is compared.")
    grid: Choices = Field({}, description="Dotted key to values: every combination, for every variant.")
    tune: TuneSection | None = Field(None, description="Choose keys for each variant and point of the grid first.")
    evaluate: EvaluateSection | None = Field(None, description="Score the trained adapters on tasks.")
    reference: Text | None = Field(
        None,
        description="Variant that the others are compared with, at the same point of the grid; null is the first. "
        "Without variants it is the grid's first point.",
    )
    hours: float | None = Field(None, gt=0, description="Start no further run after so many hours of one call.")

    @model_validator(mode="after")
    def _is_consistent(self) -> "SweepFile":
        if not self.variants and not self.grid:
            raise ValueError("it varies nothing: give variants, or a grid")
        if self.reference is not None and self.reference not in self.variants:
            raise ValueError(f"reference {self.reference!r} is no variant; expected one of {', '.join(self.variants) or 'none'}")
        if any(variant.tune for variant in self.variants.values()) and self.tune is None:
            raise ValueError("a variant has values to tune, but there is no tune section for all")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in seeds")
        return self
