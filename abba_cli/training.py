"""`abba train`: run(recipe) -> run directory, in the order in which the recipe executes."""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from transformers import TrainerState, set_seed

from abba_cli import adapting, loading, pissa
from abba_cli.batches import PackedBatches, PaddedBatches, require_separation
from abba_cli.disk import disk_errors, settle
from abba_cli.errors import RunError, TrainingInterrupted
from abba_cli.events import Finished, Listener, Stage, Started, ignore
from abba_cli.forecast.prediction import OPTIMIZER
from abba_cli.loop import AbbaTrainer, arguments, extra_callbacks
from abba_cli.loss import Collator, SupervisedBatches, keeps_logits
from abba_cli.memory import peak_memory
from abba_cli.out_of_memory import memory_errors
from abba_cli.plan import Plan
from abba_cli.preparation import Preparation, ended_run, prepare
from abba_cli.processes import join_crew, join_processes
from abba_cli.provenance import draw_losses, write_card, write_provenance
from abba_cli.recipe import Recipe
from abba_cli.recipe_file import load_recipe
from abba_cli.recorder import Recorder
from abba_cli.records import Outcome, read_outcome
from abba_cli.rundir import RunDir, check_still_newest, checkpoint_step, locked, write_recipe
from abba_cli.sampling import Sampler
from abba_cli.sealing import is_complete
from abba_cli.sharding import put_away, shard
from abba_cli.states import state_errors
from abba_cli.zero import configuration, partition, take_back


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    listen: Listener = ignore,
) -> RunDir:
    """Train the adapter that a recipe describes, or go on with the run in its output directory.

    Args:
        recipe: A recipe, or the path of one.
        overrides: `dotted.key=value` strings, for a recipe given as a path.
        restart: Start over in an output directory that holds a run, which is lost.
        listen: Called with every event of `abba_cli.events`.

    Returns:
        The finished run directory.

    Raises:
        AbbaError: Anything that the user can mend; see `abba_cli.errors`.
        TrainingInterrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise TypeError("overrides go with a recipe file; make the Recipe with load_recipe(path, overrides)")
    else:
        recipe = load_recipe(recipe, overrides)
    crew = join_crew()
    if not crew.is_main:
        listen = ignore
    ended = None if restart else crew.from_main(lambda: ended_run(recipe, crew.count))
    if ended is not None:
        listen(Finished(path=ended.path, already=True, outcome=read_outcome(ended.provenance())))
        return ended
    ready = crew.from_main(lambda: prepare(recipe, restart=restart, listen=listen, read_weights=True, processes=crew.count))
    run = ready.run
    if not restart and crew.from_main(lambda: _has_ended(ready)):
        listen(Finished(path=run.path, already=True, outcome=read_outcome(run.provenance())))
        return run

    with ExitStack() as held:
        # From here on nobody else writes there: what `prepare` has found holds until the end.
        crew.from_main(lambda: held.enter_context(locked(run)))
        if not restart:
            crew.from_main(lambda: check_still_newest(run, ready.checkpoint))
        crew.from_main(lambda: _check_room(recipe, ready.plan, run))
        listen(Stage("Loading the base model"))
        set_seed(recipe.training.seed)
        with memory_errors(run, recipe, ready.plan.memory):
            adapted = _adapted_model(ready, listen)
        adapting.check_plan(adapted, ready.plan.layers, ready.plan.trainable)
        if recipe.data.packing:
            require_separation(adapted)
        put_away(adapted)

        # Nothing was written so far: whatever could be wrong with the input has been found.
        crew.from_main(lambda: _open_run_directory(recipe, ready, adapted, listen))
        with memory_errors(run, recipe, ready.plan.memory):
            outcome = fit(adapted, ready, listen)
        crew.from_main(lambda: _complete_run_directory(recipe, ready, adapted, outcome, listen))
    listen(Finished(path=run.path, already=False, outcome=outcome))
    return run


def _adapted_model(ready: Preparation, listen: Listener) -> PeftModel:
    """The base with the run's adapter on it: started, or as the checkpoint has it."""
    recipe = ready.recipe

    def whole(device: torch.device | None = None) -> PeftModel:
        return adapting.attach_adapter(
            loading.load_model(ready.base, recipe.model, device),
            recipe.adapter,
            ready.base,
            start_from=str(ready.checkpoint) if ready.checkpoint else recipe.adapter.start_from,
            progress=lambda done, total: listen(Stage("Starting from singular vectors", done, total)),
        )

    def empty() -> PeftModel:
        return adapting.attach_adapter(loading.empty_model(ready.config, recipe.model), recipe.adapter, ready.base)

    if not ready.plan.sharded:
        return whole()
    crew, device = join_crew(), join_processes().device
    if recipe.distributed.strategy == "deepspeed":
        return partition(lambda: whole(torch.device("cpu")), empty, crew, device, configuration(recipe))
    return shard(lambda: whole(torch.device("cpu")), empty, crew, device, recipe.distributed.offload)


def fit(model: PeftModel, ready: Preparation, listen: Listener) -> Outcome:
    """Train `model` in place, up to the recipe's steps, writing metrics and checkpoints into the run directory.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came; a checkpoint was saved.
        TrainingDiverged: The loss or the gradient norm is no longer finite.
        RunError: The disk is full, or the best checkpoint was damaged.
    """
    run, recipe, steps, data = ready.run, ready.recipe, ready.plan.steps, ready.data
    first = checkpoint_step(ready.checkpoint) if ready.checkpoint else 0
    recorder = Recorder(recipe, run, join_crew(), listen)
    pad_id = ready.tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    collate: Collator = PackedBatches() if recipe.data.packing else PaddedBatches(pad_id)
    trainer = AbbaTrainer(
        model=model,
        args=arguments(recipe, run, steps, fresh=first == 0),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=SupervisedBatches(collate, keeps_logits(model.get_base_model())),
        callbacks=[Sampler(recipe, run, ready.tokenizer, data, listen), recorder, *extra_callbacks(recipe)],
        group_by_length=recipe.training.group_by_length,
        zero=configuration(recipe) if recipe.distributed.strategy == "deepspeed" and join_crew().count > 1 else None,
    )
    listen(Started(first, steps, ready.checkpoint))
    if first < steps and not _stopped_early(recipe, ready.checkpoint):
        with recorder.signals(), disk_errors(run.path), state_errors(run.checkpoints), join_crew().in_contact():
            trainer.train(resume_from_checkpoint=str(ready.checkpoint) if ready.checkpoint else None)
        state = trainer.state
    else:
        # Ended between the last checkpoint and the finished run: only the end is missing.
        assert ready.checkpoint is not None
        state = TrainerState.load_from_json(str(ready.checkpoint / "trainer_state.json"))
        join_crew().from_main(lambda: recorder.thin(state))
    if recorder.signal_number is not None and state.global_step < steps:
        raise TrainingInterrupted(
            f"stopped after step {state.global_step} of {steps}; everything is saved in {run.path}. "
            "Run the same command again to go on",
            recorder.signal_number,
        )
    take_back(model)
    used = state.global_step
    if recipe.evaluation.keep_best and state.best_global_step and state.best_global_step != state.global_step:
        used = state.best_global_step
        best = run.checkpoints / f"checkpoint-{used}"
        if not is_complete(best):
            raise RunError(
                f"{best}, which has the lowest evaluation loss, is damaged (its files differ from manifest.json); bring a good "
                "copy back, or end with the last adapter: --set evaluation.keep_best=false"
            )
        set_peft_model_state_dict(model, pissa.trained_weights(model, str(best)))
    return _outcome(run, state.global_step, steps, used, recorder.saving_seconds)


def _stopped_early(recipe: Recipe, checkpoint: Path | None) -> bool:
    """Whether the checkpoint is of a step after which patience had run out; to go on takes more patience."""
    if checkpoint is None or recipe.evaluation.patience is None:
        return False
    callbacks = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).stateful_callbacks
    attributes = callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    return int(attributes.get("early_stopping_patience_counter", 0)) >= recipe.evaluation.patience


def _outcome(run: RunDir, made: int, planned: int, used: int, saving_seconds: float) -> Outcome:
    rows = run.metrics()
    steps = [row for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    held_out = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    return Outcome(
        steps=made,
        planned_steps=planned,
        used_step=used,
        seconds=steps[-1]["seconds"] if steps else 0.0,
        peak_memory_bytes=max((row["memory_bytes"] for row in steps), default=peak_memory()),
        train_loss=sum(tail) / len(tail) if tail else None,
        eval_loss_before=held_out.get(0),
        eval_loss=held_out.get(used),
        saving_seconds=round(max(saving_seconds, steps[-1].get("saving_seconds", 0.0) if steps else 0.0), 3),
    )


def _has_ended(ready: Preparation) -> bool:
    """Whether the run has made the steps that it is asked for."""
    run = ready.run
    return run.finished and ready.checkpoint is not None and run.provenance()["outcome"]["planned_steps"] >= ready.plan.steps


def _open_run_directory(recipe: Recipe, ready: Preparation, adapted: PeftModel, listen: Listener) -> None:
    """Write what a run directory has from its start, without what a killed run wrote after the checkpoint."""
    run = ready.run
    with disk_errors(run.path):
        if ready.checkpoint is None:
            run.clear()
        else:
            run.forget_after(checkpoint_step(ready.checkpoint))
        write_provenance(run, recipe, ready.base, ready.config, ready.data, ready.plan, None)
    write_recipe(run, recipe)
    listen(Stage("Trying a save"))
    with disk_errors(run.path):
        _try_save(adapted, run.path / ".trial")


def _complete_run_directory(recipe: Recipe, ready: Preparation, adapted: PeftModel, outcome: Outcome, listen: Listener) -> None:
    """Write the adapter and what stands beside it."""
    run = ready.run
    listen(Stage("Writing the run directory"))
    with disk_errors(run.path):
        _place_adapter(adapted, run)
        ready.tokenizer.save_pretrained(run.path)
        draw_losses(run)
        write_card(run, recipe, ready.base, ready.plan, outcome)
        settle(run.path)  # what says that the run has finished must not outlive the rest in a power cut
        write_provenance(run, recipe, ready.base, ready.config, ready.data, ready.plan, outcome)


def _try_save(model: PeftModel, trial: Path) -> None:
    """Save once before the first step, so that a run does not find out at its end that it cannot."""
    try:
        pissa.save(model, trial)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _check_room(recipe: Recipe, plan: Plan, run: RunDir) -> None:
    """Raise a RunError where the disk has no room for what the run will keep."""
    # A checkpoint is the adapter and the optimizer's state. A new one is complete before an old one goes, the best one is kept
    # besides, and the finished run has the adapter and the tokenizer at its top.
    adapter = plan.trainable * getattr(torch, recipe.adapter.dtype).itemsize * (2 if recipe.adapter.method == "pissa" else 1)
    checkpoint = adapter + plan.memory.uses[OPTIMIZER]
    needed = (recipe.checkpoints.keep + 1 + bool(recipe.evaluation.every_steps)) * checkpoint + adapter + 10_000_000
    # The run's own checkpoints make way for new ones.
    free = shutil.disk_usage(run.path).free + sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    if free < needed:
        raise RunError(
            f"the disk of {run.path} has {free / 1e6:,.0f} MB free, checkpoints need {needed / 1e6:,.0f} MB; "
            "make room or choose another output"
        )


def _place_adapter(model: PeftModel, run: RunDir) -> None:
    """Put the adapter at the top of the run directory, each file whole or not at all."""
    partial = run.path / ".final"
    try:
        pissa.save(model, partial)
        for file in partial.iterdir():
            os.replace(file, run.path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
