"""What fits into a memory budget: the largest batch, and the settings that help where the recipe's own is too large."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from abba_cli.errors import ModelError
from abba_cli.forecast.prediction import Forecast, forecast
from abba_cli.forecast.rows import HeavyRows
from abba_cli.recipe import Recipe


@dataclass(frozen=True)
class Switch:
    """A change of the recipe that takes less memory.

    Attributes:
        settings: Values by dotted key.
        total: Bytes with it.
        saved: Bytes less than without it.
    """

    settings: Mapping[str, Any]
    total: int
    saved: int


@dataclass(frozen=True)
class Fit:
    """What fits into a budget.

    Attributes:
        budget: Bytes on each device.
        recipe: The forecast of the recipe as it is.
        largest: The forecast at the largest batch_size that fits; None where not even one row does.
        limited_by_data: Whether a larger batch would fit, but the data has no more rows.
        switches: Where the recipe does not fit, what would help, most first.
        together: The first of these that are enough together; empty where all of them are not.
    """

    budget: int
    recipe: Forecast
    largest: Forecast | None
    limited_by_data: bool
    switches: tuple[Switch, ...]
    together: tuple[Switch, ...]


def fit(recipe: Recipe, skeleton: PeftModel, rows: HeavyRows, budget: int, processes: int = 1) -> Fit:
    """Find what fits into a budget; every answer is simulated.

    Args:
        recipe: The recipe.
        skeleton: The base's skeleton with the adapter on it.
        rows: The training data.
        budget: Bytes on each device.
        processes: Processes that train together, each on a device of its own.

    Raises:
        ModelError: The model's step cannot be simulated.
    """
    known: dict[int, Forecast] = {}

    def at(settings: Mapping[str, Any]) -> Forecast:
        return forecast(changed(recipe, settings), skeleton, rows, processes)

    def total(count: int) -> int:
        if count not in known:
            known[count] = at({"training.batch_size": count})
        return known[count].total

    size = recipe.training.batch_size
    if total(size) and known[size].gap:
        raise ModelError(f"the memory of a step of this model cannot be simulated, so nothing is known to fit: {known[size].gap}")
    most = max(size, rows.table.num_rows)
    largest = largest_that_fits(total, budget, most)
    switches: tuple[Switch, ...] = ()
    together: tuple[Switch, ...] = ()
    if total(size) > budget:
        tried = [(settings, at(settings).total) for settings in _candidates(recipe, skeleton, rows)]
        useful = [Switch(settings, found, total(size) - found) for settings, found in tried if found < total(size)]
        switches = tuple(sorted(useful, key=lambda switch: switch.total))
        together = _enough(switches, lambda settings: at(settings).total, budget)
    return Fit(budget, known[size], known.get(largest), largest == most, switches, together)


def largest_that_fits(total: Callable[[int], int], budget: int, most: int) -> int:
    """The largest number from 1 to `most` whose total is within the budget; 0 where none is.

    The total grows almost in proportion, so that a straight line through two points nearly hits it.
    """
    if total(1) > budget:
        return 0
    low, high = 1, most + 1  # fits, and does not
    other = min(2, most)
    for attempt in range(2 * most.bit_length() + 2):
        if high - low <= 1:
            break
        slope = (total(other) - total(low)) / (other - low) if other != low else 0.0
        guess = low + int((budget - total(low)) / slope) if slope > 0 else high - 1
        # Where the line keeps missing, halves do not.
        guess = guess if attempt < 6 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        other = low
        if total(guess) <= budget:
            low = guess
        else:
            high = other = guess
    return low


def changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A recipe with other values of some dotted keys."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        before = sections.get(section, getattr(recipe, section))
        sections[section] = before.model_copy(update={name: value})
    return recipe.model_copy(update=sections)


def _candidates(recipe: Recipe, skeleton: PeftModel, rows: HeavyRows) -> list[dict[str, Any]]:
    """Changes that the recipe has not made yet."""
    found: list[dict[str, Any]] = []
    training, quantising = recipe.training, importlib.util.find_spec("bitsandbytes") is not None
    if not training.gradient_checkpointing:
        found.append({"training.gradient_checkpointing": True})
    if recipe.model.quantization != "nf4" and quantising:
        found.append({"model.quantization": "nf4"})
    if training.optimizer == "adamw" and quantising:
        found.append({"training.optimizer": "adamw_8bit"})
    if recipe.adapter.dtype == "float32":
        found.append({"adapter.dtype": "bfloat16"})
    if training.batch_size > 1:
        accumulation = 2 * training.gradient_accumulation
        found.append({"training.batch_size": training.batch_size // 2, "training.gradient_accumulation": accumulation})
    half = {"data.max_length_tokens": max(8, min(rows.longest, recipe.data.max_length_tokens) // 2)}
    if len(rows.batch(changed(recipe, half), keeps_logits=False)["targets"]):  # else the answers are cut off
        found.append(half)
    base: Any = skeleton.get_base_model()
    attention = base.config._attn_implementation if recipe.model.attention == "auto" else recipe.model.attention
    if attention == "eager" and base._supports_sdpa:
        found.append({"model.attention": "sdpa"})
    return found


def _enough(switches: tuple[Switch, ...], total: Callable[[Mapping[str, Any]], int], budget: int) -> tuple[Switch, ...]:
    settings: dict[str, Any] = {}
    for count, switch in enumerate(switches, start=1):
        settings |= switch.settings
        if (switch.total if count == 1 else total(settings)) <= budget:
            return switches[:count]
    return ()
