"""What is known about a run before a weight is read: its base, data, plan, and the checkpoint that it goes on from."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from abba_cli import adapting, bases, loading
from abba_cli.data import prepare as prepare_data
from abba_cli.errors import RunError
from abba_cli.events import Audited, Listener, Planned, Stage, ignore
from abba_cli.loop import check_logger, total_steps
from abba_cli.memory import device_memory
from abba_cli.methods import adapter_config
from abba_cli.plan import Plan, check_length, make_plan, with_strategy
from abba_cli.prepared import PreparedData
from abba_cli.recipe import Recipe
from abba_cli.recipe_file import BUILT_IN_TEMPLATES, differences
from abba_cli.rundir import RunDir, checkpoint_step, open_run
from abba_cli.sealing import is_sealed
from abba_cli.sources import digests
from abba_cli.zero import check_deepspeed


@dataclass(frozen=True)
class Preparation:
    """Everything known about a run before a weight is read.

    Attributes:
        run: The run directory.
        recipe: The recipe as each process runs it: a run that goes on with another number of processes shares out the same rows
            of an optimizer step in another way.
        checkpoint: Where the run goes on; None at its start.
        base: Where the base is.
        config: Of the base.
        tokenizer: Of the base.
        data: The rows.
        plan: The size of it.
    """

    run: RunDir
    recipe: Recipe
    checkpoint: Path | None
    base: bases.Base
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    plan: Plan


def prepare(
    recipe: Recipe,
    *,
    restart: bool = False,
    listen: Listener = ignore,
    read_weights: bool = False,
    budget: int | None = None,
    processes: int = 1,
) -> Preparation:
    """Check everything that can be checked before the weights are read: output, base, adapter, data, memory.

    Args:
        recipe: The recipe.
        restart: As in `train`.
        listen: Called with events.
        read_weights: Make the cached checkpoint of a GGUF base, if there is none yet. A dry run does not.
        budget: Bytes on each device to find the largest batch for.
        processes: Processes that train together.

    Raises:
        AbbaError: Whatever does not fit.
    """
    run, checkpoint = open_run(recipe, restart, processes)
    for damaged in [] if checkpoint is None else _passed_over(run, checkpoint):
        listen(Stage(f"Passing over {damaged.name}: its files are not those of its manifest.json; going on before it"))
    listen(Stage("Reading the model's configuration"))
    if recipe.distributed.offload and processes == 1:
        raise RunError("distributed.offload needs several processes that share the base out; this is one: set it to false")
    loading.check_quantization(recipe.model)
    check_logger(recipe)
    check_deepspeed(recipe)
    base = bases.find_base(recipe.model)
    if base.gguf_file and read_weights:
        listen(Stage(f"Dequantising {base.gguf_file} (once)"))
        base = bases.dequantised(base, recipe.model)
    config = loading.load_config(base, recipe.model)
    tokenizer = loading.load_tokenizer(base, recipe.model)
    skeleton = adapting.check_adapter(config, recipe.model, recipe.adapter, base)
    if recipe.adapter.start_from is not None:
        adapting.check_saved(adapter_config(recipe.adapter, base), recipe.adapter.start_from)

    listen(Stage("Reading the data"))
    data = prepare_data(
        recipe.data,
        tokenizer,
        recipe.training.seed,
        samples=recipe.evaluation.samples,
        progress=lambda done, total: listen(Stage("Tokenising", done, total)),
    )
    listen(Audited(data))
    if checkpoint is not None:
        _check_same_data(run, data)
        recipe = _shared_out(recipe, processes, run)
    steps = total_steps(recipe, len(data.train), processes)
    if checkpoint is not None and checkpoint_step(checkpoint) > steps:
        raise RunError(
            f"the run in {run.path} has made {checkpoint_step(checkpoint)} steps already, the recipe asks for {steps}; "
            "raise training.max_steps or training.epochs, choose another output, or --restart to start over"
        )
    check_length(recipe, config, data)
    listen(Stage("Forecasting memory"))
    recipe = with_strategy(recipe, skeleton, data.train, processes, device_memory() if budget is None else budget)
    plan = make_plan(recipe, skeleton, data.train, steps, processes, budget)
    listen(Planned(plan))
    return Preparation(run, recipe, checkpoint, base, config, tokenizer, data, plan)


def ended_run(recipe: Recipe, processes: int = 1) -> RunDir | None:
    """The run in the recipe's output, if it has finished and its directory shows that the recipe asks for nothing more.

    That is so where the recipe is the same and all data lies in files with the digests recorded. Of any other change, such as
    one of a data set on the hub, `prepare` will know.

    Raises:
        AbbaError: The output cannot be used, or data is gone.
    """
    run = RunDir(Path(recipe.output).expanduser())
    if not run.is_run or not run.finished or recipe.data.template not in BUILT_IN_TEMPLATES:
        return None
    open_run(recipe, processes=processes)
    if differences(run.recipe(), recipe).keys() - {"output"}:
        return None
    found: dict[str, str] = {}
    for source in [*recipe.data.train, *recipe.data.eval]:
        files = digests(source)
        if files is None:
            return None
        found |= files
    return run if found == run.provenance()["data"].get("files") else None


def _passed_over(run: RunDir, checkpoint: Path) -> list[Path]:
    """Checkpoints that were finished once after the one that a run goes on from: they would be taken if they were whole."""
    finished = [path for path in run.checkpoints.glob("checkpoint-*") if is_sealed(path)]
    return [path for path in finished if checkpoint_step(path) > checkpoint_step(checkpoint)]


def _check_same_data(run: RunDir, data: PreparedData) -> None:
    try:
        before = run.provenance()["data"]["fingerprint"]
    except RunError:
        return
    if before != data.fingerprint:
        raise RunError(
            f"the data is not what the run in {run.path} was started with (fingerprint {data.fingerprint[:12]}, "
            f"there {before[:12]}); bring the old data back, choose another output, or --restart to start over"
        )


def _shared_out(recipe: Recipe, processes: int, run: RunDir) -> Recipe:
    """The recipe with the batch of each process such that an optimizer step has as many rows as when the run was started.

    Raises:
        RunError: The rows cannot be shared evenly.
    """
    training = recipe.training
    here = training.batch_size * training.gradient_accumulation
    rows = run.provenance().get("rows_per_step", here)
    if rows == here * processes:
        return recipe
    each, left = divmod(rows, processes)
    if left:
        raise RunError(
            f"the run in {run.path} takes {rows} rows in an optimizer step, which {processes} processes cannot share evenly; "
            f"go on with a number of processes that divides {rows}, or --restart to start over"
        )
    batch = max(size for size in range(1, training.batch_size + 1) if each % size == 0)
    shared = training.model_copy(update={"batch_size": batch, "gradient_accumulation": each // batch})
    return recipe.model_copy(update={"training": shared})
