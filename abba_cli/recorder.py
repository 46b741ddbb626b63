"""What a run writes and says while it trains: metrics, checkpoints sealed and thinned, stops at signals and bad losses."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from abba_cli.disk import append_jsonl, disk_errors
from abba_cli.errors import TrainingDiverged, TrainingInterrupted
from abba_cli.events import Evaluated, Listener, Saved, Stepped, Stopping
from abba_cli.memory import peak_memory
from abba_cli.processes import Crew
from abba_cli.recipe import Recipe
from abba_cli.rundir import RunDir, remove_old_checkpoints
from abba_cli.sealing import seal_checkpoint

IMPATIENCE_SECONDS = 1.0
"""After a first signal; a sooner one is an echo of it: Linux tells of a launcher's death once for each of its threads."""


class Recorder(TrainerCallback):
    """Writes metrics, seals and thins checkpoints, reports progress, and stops at signals and at losses that are no number."""

    def __init__(self, recipe: Recipe, run: RunDir, crew: Crew, listen: Listener) -> None:
        self.recipe, self.run, self.crew, self.listen = recipe, run, crew, listen
        self.signal_number: int | None = None
        self.saving_seconds = 0.0
        self._asked: float | None = None  # when this process got a signal; of those of others it hears through signal_number
        self._clock = (time.perf_counter(), 0)
        self._began = time.perf_counter()
        self._processor_began = time.process_time()
        self._before_saving = time.perf_counter()

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
        logged = [row for row in self.run.metrics() if "seconds" in row]
        self._began = time.perf_counter() - (logged[-1]["seconds"] if logged else 0.0)
        self._processor_began = time.process_time() - (logged[-1].get("processor_seconds", 0.0) if logged else 0.0)
        self.saving_seconds = logged[-1].get("saving_seconds", 0.0) if logged else 0.0
        self._clock = (time.perf_counter(), int(state.num_input_tokens_seen))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_if_asked(control)
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
            "processor_seconds": round(time.process_time() - self._processor_began, 3),
            "saving_seconds": round(self.saving_seconds, 3),
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
        self._before_saving = time.perf_counter()

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
        # Evaluation time is not training time, nor is it saving time.
        self._clock = (time.perf_counter(), int(state.num_input_tokens_seen))
        self._before_saving = time.perf_counter()
        if step > 0:
            self._stop_if_asked(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.crew.wait()  # each process has written its random state
        if not state.is_world_process_zero:
            return
        checkpoint = self.run.checkpoints / f"checkpoint-{state.global_step}"
        with disk_errors(self.run.path):
            self.run.sync_logs()
            seal_checkpoint(checkpoint)
        self.thin(state)
        self.listen(Saved(state.global_step, checkpoint))
        # Trainer begins to save when the step is logged, and evaluated where it is.
        self.saving_seconds += time.perf_counter() - self._before_saving

    def _stop_if_asked(self, control: TrainerControl) -> None:
        """Save and end where the training stands, if a signal has come."""
        # The processes hear of it at different moments, and have to stop after the same step. A signal may come while they ask
        # one another: it is kept for the next time.
        told = self.crew.largest(self.signal_number or 0)
        if told:
            self.signal_number = told
            control.should_save = control.should_training_stop = True

    def thin(self, state: TrainerState) -> None:
        """Remove the checkpoints that the recipe does not keep."""
        best = self.run.checkpoints / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
        with disk_errors(self.run.path):
            remove_old_checkpoints(self.run, self.recipe.checkpoints.keep, best if self.recipe.evaluation.keep_best else None)

    def _divergence(self, name: str, value: float, step: int) -> str:
        checkpoints = self.run.complete_checkpoints()
        kept = f"{checkpoints[-1]} is kept" if checkpoints else "there was no checkpoint yet"
        what = {"loss": "loss", "grad_norm": "gradient norm"}[name]
        alpha = "" if self.recipe.adapter.alpha is None else f" or adapter.alpha ({self.recipe.adapter.alpha:g})"
        advice = (
            f"Lower training.learning_rate ({self.recipe.training.learning_rate:g}){alpha} and start anew with --restart or "
            "another output, and look at the rows of that step"
        )
        if step == 1:
            advice = (
                "Nothing was learned yet, so that it comes from the base or the data: look at the files of the base, at "
                f"model.dtype ({self.recipe.model.dtype}), and at the rows of that step"
            )
        return f"the {what} is {value} at step {step}; training stopped, {kept}. {advice}"

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within this, SIGINT and SIGTERM end training after the current step and a checkpoint; a second one ends it at once."""

        def receive(number: int, frame: Any) -> None:
            now = time.monotonic()
            if self._asked is not None and now - self._asked > IMPATIENCE_SECONDS:
                raise TrainingInterrupted("ended at once; run the same command again to go on from the last checkpoint", number)
            self._asked = self._asked or now
            if self.signal_number is None:
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
