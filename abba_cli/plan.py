"""What a run will train and how much memory it will take, known before a weight is read."""

from dataclasses import dataclass

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig

from abba_cli.adapter.starts import AWAY_FROM_BASE
from abba_cli.adapting import AdaptedLayer, adapted_layers
from abba_cli.errors import ModelError
from abba_cli.forecast.fitting import Fit, fit
from abba_cli.forecast.prediction import Forecast, forecast
from abba_cli.forecast.rows import heavy_rows
from abba_cli.methods import in_words
from abba_cli.prepared import PreparedData
from abba_cli.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Args:
        model: Name of the base in the recipe.
        layers: The adapted layers.
        update: What is added to their weights, in words.
        begins_away: The start of the factors, where it is another model than the base; else None.
        trainable: Parameters that are trained.
        total: Parameters in all.
        processes: Processes that train together.
        strategy: How they do, such as ddp or deepspeed, ZeRO 3; None for one process.
        idle_strategy: What the recipe asks for in vain, for one process.
        sharded: Whether they share the base out.
        steps: Optimizer steps.
        rows_per_step: Rows in an optimizer step, of all processes.
        tokens_per_step: Upper bound of the tokens in one optimizer step of one process.
        memory: Bytes on each device, by use.
        fit: What fits into the budget asked about.
    """

    model: str
    layers: list[AdaptedLayer]
    update: str
    begins_away: str | None
    trainable: int
    total: int
    processes: int
    strategy: str | None
    idle_strategy: str | None
    sharded: bool
    steps: int
    rows_per_step: int
    tokens_per_step: int
    memory: Forecast
    fit: Fit | None


def with_strategy(recipe: Recipe, adapted: PeftModel, train: Dataset, processes: int, memory: int | None) -> Recipe:
    """The recipe with `distributed.strategy: auto` decided: share the base out only where it does not fit as a whole.

    Args:
        recipe: The recipe.
        adapted: The base's skeleton with the adapter on it.
        train: The prepared training rows.
        processes: Processes that train together.
        memory: Bytes of each device; None where they do not matter, on a CPU.
    """
    if recipe.distributed.strategy != "auto":
        return recipe
    ddp, fsdp = (
        recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"strategy": strategy})})
        for strategy in ("ddp", "fsdp")
    )
    whole = recipe.model.quantization == "int8" or recipe.training.compile or not recipe.adapter.is_abba
    if processes == 1 or memory is None or whole:
        return ddp
    return ddp if forecast(ddp, adapted, heavy_rows(train), processes).total <= memory else fsdp


def make_plan(
    recipe: Recipe, adapted: PeftModel, train: Dataset, steps: int, processes: int = 1, budget: int | None = None
) -> Plan:
    """Size up a run.

    Args:
        recipe: The recipe.
        adapted: The base's skeleton with the adapter on it.
        train: The prepared training rows.
        steps: Optimizer steps.
        processes: Processes that train together.
        budget: Bytes on each device to find the largest batch for; None to leave that out.

    Raises:
        ModelError: With a budget, the model's step cannot be simulated.
    """
    rows = heavy_rows(train)
    answer = None if budget is None else fit(recipe, adapted, rows, budget, processes)
    memory = answer.recipe if answer is not None else forecast(recipe, adapted, rows, processes)
    asked = recipe.distributed
    strategy = f"deepspeed, ZeRO {asked.zero_stage}" if asked.strategy == "deepspeed" else asked.strategy
    return Plan(
        model=recipe.model.name,
        layers=adapted_layers(adapted),
        update=in_words(recipe.adapter),
        begins_away=recipe.adapter.init if recipe.adapter.init in AWAY_FROM_BASE else None,
        trainable=sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad),
        total=sum(parameter.numel() for parameter in adapted.parameters()),
        processes=processes,
        strategy=strategy if processes > 1 else None,
        idle_strategy=asked.strategy if processes == 1 and asked.strategy != "ddp" else None,
        sharded=asked.shares_base and processes > 1,
        steps=steps,
        rows_per_step=recipe.training.batch_size * recipe.training.gradient_accumulation * processes,
        tokens_per_step=memory.tokens * recipe.training.gradient_accumulation,
        memory=memory,
        fit=answer,
    )


def check_length(recipe: Recipe, config: PreTrainedConfig, data: PreparedData) -> None:
    """Raise a ModelError when a row has more tokens than the model has positions; packed rows start from 0 each."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    rows = max(audit.longest_row_tokens for audit in data.audit.values())
    longest = min(rows, recipe.data.max_length_tokens)
    if positions and longest > positions:
        raise ModelError(
            f"the longest row has {longest} tokens, but the model has {positions} positions; "
            f"set data.max_length_tokens to at most {positions}"
        )
