"""The training loop: transformers' Trainer with the recipe's settings, an exact evaluation loss, and run-directory callbacks."""

import dataclasses
import importlib.util
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from abba_cli.disk import append_jsonl, disk_errors
from abba_cli.errors import RunError, TrainingDiverged, TrainingInterrupted
from abba_cli.events import Evaluated, Listener, Saved, Stepped, Stopping
from abba_cli.loss import row_losses
from abba_cli.memory import peak_memory
from abba_cli.recipe import Recipe
from abba_cli.rundir import RunDir, remove_old_checkpoints, seal_checkpoint

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def total_steps(recipe: Recipe, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run: `max_steps`, else `epochs` over `rows` sequences shared by the processes."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    batches = math.ceil(rows / (recipe.training.batch_size * processes))
    return math.ceil(recipe.training.epochs * math.ceil(batches / recipe.training.gradient_accumulation))


def arguments(recipe: Recipe, run: RunDir, steps: int, fresh: bool) -> TrainingArguments:
    """Translate a recipe into the Trainer's terms; the one place that does.

    Args:
        recipe: The recipe.
        run: Where checkpoints go.
        steps: Optimizer steps in all.
        fresh: Evaluate before the first step.
    """
    training, evaluation = recipe.training, recipe.evaluation
    cuda = torch.cuda.is_available()
    evaluating = bool(recipe.data.eval)
    # Renamed in transformers 5.23; the old name goes with version 6.
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    recompute: dict[str, Any] = {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": False}}
    built = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=evaluation.batch_size or training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=_SCHEDULERS[training.scheduler],
        warmup_steps=training.warmup_ratio,
        optim=_OPTIMIZERS[training.optimizer],
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        **(recompute if training.gradient_checkpointing else {}),
        torch_compile=training.compile,
        seed=training.seed,
        # No autocast for bfloat16: the base is bfloat16, and the adapter casts its own float32 factors. Only float16 needs the
        # loss scaling that comes with it.
        bf16=False,
        fp16=recipe.model.dtype == "float16" and cuda,
        eval_strategy="steps" if evaluating else "no",
        eval_steps=min(evaluation.every_steps or steps, steps),
        eval_on_start=evaluating and fresh and evaluation.at_start,
        metric_for_best_model="loss" if evaluating else None,
        greater_is_better=False if evaluating else None,
        save_strategy="steps",
        save_steps=recipe.checkpoints.every_steps,
        logging_steps=recipe.logging.every_steps,
        logging_nan_inf_filter=False,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on where it was
        include_num_input_tokens_seen="non_padding",
        report_to=[] if recipe.logging.logger == "none" else [recipe.logging.logger],
        run_name=Path(recipe.output).name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
    )
    if built.parallel_mode.value == "not_distributed" and cuda:
        # With several cards and one process, Trainer would take nn.DataParallel, which replicates the model every step.
        built._n_gpu = 1
    return built


class AbbaTrainer(Trainer):
    """Trainer whose evaluation loss is the mean over supervised tokens, whatever the batches (upstream averages batches)."""

    @torch.no_grad()
    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluate on `eval_dataset`.

        Returns:
            `eval_loss`, in nats per supervised token, and `eval_seconds`.
        """
        start = time.perf_counter()
        model = self.model_wrapped if self.is_in_train else self.accelerator.prepare_model(self.model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        losses, counts = [torch.zeros(0)], [torch.zeros(0)]
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            rows = row_losses(model(**{**batch, "use_cache": False}).logits, labels)
            loss, count = self.accelerator.gather_for_metrics(rows)
            losses.append(loss.cpu())
            counts.append(count.cpu())
        model.train(was_training)
        mean = (torch.cat(losses).double().sum() / torch.cat(counts).double().sum()).item()
        metrics = {f"{metric_key_prefix}_loss": mean, f"{metric_key_prefix}_seconds": time.perf_counter() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Recorder(TrainerCallback):
    """Writes metrics, seals and thins checkpoints, reports progress, and stops at signals and at losses that are no number."""

    def __init__(self, recipe: Recipe, run: RunDir, listen: Listener) -> None:
        self.recipe, self.run, self.listen = recipe, run, listen
        self.signal_number: int | None = None
        self._clock = (time.perf_counter(), 0)
        self._began = time.perf_counter()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        # A resumed state brings the intervals of the recipe it was saved under; these keys may change.
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]
        # And the rate of the schedule it was saved under, which is another one where the run is prolonged.
        for group, base, rate in zip(optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True):
            group["lr"] = base * rate(lr_scheduler.last_epoch)
        lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
        logged = [row["seconds"] for row in self.run.metrics() if "seconds" in row]
        self._began = time.perf_counter() - (logged[-1] if logged else 0.0)
        self._clock = (time.perf_counter(), int(state.num_input_tokens_seen))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.signal_number is not None:
            control.should_save = control.should_training_stop = True
        # A checkpoint is only good if the loss that led to it was looked at; a best one is decided after an evaluation.
        if control.should_save or control.should_evaluate:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        bad = [key for key in ("loss", "grad_norm") if not math.isfinite(logs.get(key, 0.0))]
        if bad:
            raise TrainingDiverged(self._divergence(bad[0], logs[bad[0]], state.global_step))
        now, seen = time.perf_counter(), int(state.num_input_tokens_seen)
        speed = (seen - self._clock[1]) / max(now - self._clock[0], 1e-9)
        self._clock = (now, seen)
        if not state.is_world_process_zero:
            return
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "gradient_norm": logs.get("grad_norm"),
            "tokens": seen,
            "tokens_per_second": round(speed, 1),
            "seconds": round(now - self._began, 3),
            "memory_bytes": peak_memory(),
        }
        with disk_errors(self.run.path):
            append_jsonl(self.run.metrics_file, row)
        event = Stepped(
            state.global_step,
            state.max_steps,
            logs["loss"],
            logs["learning_rate"],
            logs.get("grad_norm"),
            speed,
            peak_memory(),
        )
        self.listen(event)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.signal_number is not None and state.global_step == 0:
            raise TrainingInterrupted("stopped before the first step; nothing was trained yet", self.signal_number)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        loss, step = metrics["eval_loss"], state.global_step
        best = step > 0 and (state.best_metric is None or loss < state.best_metric)
        if best and self.recipe.evaluation.keep_best:
            control.should_save = True
        if state.is_world_process_zero:
            with disk_errors(self.run.path):
                row = {"step": step, "eval_loss": loss, "eval_seconds": round(metrics["eval_seconds"], 3)}
                append_jsonl(self.run.metrics_file, row)
            self.listen(Evaluated(step, loss, best))
        # Evaluation time is not training time.
        self._clock = (time.perf_counter(), int(state.num_input_tokens_seen))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = self.run.checkpoints / f"checkpoint-{state.global_step}"
        with disk_errors(self.run.path):
            seal_checkpoint(checkpoint)
            best = self.run.checkpoints / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
            remove_old_checkpoints(self.run, self.recipe.checkpoints.keep, best if self.recipe.evaluation.keep_best else None)
        self.listen(Saved(state.global_step, checkpoint))

    def _divergence(self, name: str, value: float, step: int) -> str:
        checkpoints = self.run.complete_checkpoints()
        kept = f"{checkpoints[-1]} is kept" if checkpoints else "there was no checkpoint yet"
        what = {"loss": "loss", "grad_norm": "gradient norm"}[name]
        return (
            f"the {what} is {value} at step {step}; training stopped, {kept}. "
            f"Lower training.learning_rate ({self.recipe.training.learning_rate:g}) or adapter.alpha "
            f"({self.recipe.adapter.alpha:g}), and look at the rows of that step"
        )

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within this, SIGINT and SIGTERM end training after the current step and a checkpoint; a second one ends it at once."""

        def receive(number: int, frame: Any) -> None:
            if self.signal_number is not None:
                raise TrainingInterrupted("ended at once; run the same command again to go on from the last checkpoint", number)
            self.signal_number = number
            self.listen(Stopping())

        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return
        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def extra_callbacks(recipe: Recipe) -> list[TrainerCallback]:
    """Early stopping, where the recipe asks for it."""
    patience = recipe.evaluation.patience
    return [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []


def check_logger(recipe: Recipe) -> None:
    """Make sure that the recipe's logger can be used.

    Raises:
        RunError: Its package is not installed.
    """
    name = recipe.logging.logger
    if name != "none" and importlib.util.find_spec(name) is None:
        raise RunError(f"logging.logger: {name} is not installed; pip install {name}, or set it to none")


def quiet(trainer: Trainer) -> Trainer:
    """Take out the Trainer's own printing; only the `ui` rooms print."""
    trainer.remove_callback(PrinterCallback)
    return trainer
