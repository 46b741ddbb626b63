"""The training loop: transformers' Trainer with the recipe's settings, our loss, and nothing beside the step that takes time."""

import contextlib
import dataclasses
import importlib.util
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import speed_metrics

from abba_cli import pissa
from abba_cli.batches import grouped_by_length
from abba_cli.errors import RunError
from abba_cli.head import separable_head
from abba_cli.loss import row_losses, training_loss
from abba_cli.processes import PATIENCE
from abba_cli.recipe import Recipe
from abba_cli.rundir import RunDir
from abba_cli.sharding import is_sharded, put_away, replicate
from abba_cli.zero import Engine, hand_over, whole_factors

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
        include_num_input_tokens_seen="no",  # AbbaTrainer counts without waiting for the device
        report_to=[] if recipe.logging.logger == "none" else [recipe.logging.logger],
        log_level_replica="passive",  # else all processes but the main one warn, of what may change when a run goes on
        run_name=Path(recipe.output).name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        accelerator_config={
            "non_blocking": cuda,
            # DeepSpeed shares the gradients out after each pass, and takes no_sync for a mistake.
            "gradient_accumulation_kwargs": {"sync_each_batch": recipe.distributed.strategy == "deepspeed"},
        },
        ddp_find_unused_parameters=False,
        ddp_timeout=int(PATIENCE.total_seconds()),
        # Without being told, accelerate takes a process group on a machine without accelerator for a single process.
        use_cpu=not torch.accelerator.is_available(),
    )
    if built.parallel_mode.value == "not_distributed" and cuda:
        # With several cards and one process, Trainer would take nn.DataParallel, which replicates the model every step.
        built._n_gpu = 1
    return built


class AbbaTrainer(Trainer):
    """Trainer with our loss, in training and evaluation, that prints nothing and never makes a GPU wait for the processor.

    Args:
        model: The model with its adapter.
        group_by_length: Put rows of like length into one batch.
        zero: DeepSpeed's settings, where it trains the model.
        kwargs: Whatever else Trainer takes.
    """

    def __init__(
        self, *, model: PeftModel, group_by_length: bool = False, zero: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model=model, **kwargs)
        self.remove_callback(PrinterCallback)  # only the `ui` rooms print
        # A compiled forward pass has its head compiled in.
        self._head = None if self.args.torch_compile or (zero is not None and is_sharded(model)) else separable_head(model)
        self._group_by_length, self._zero = group_by_length, zero
        self._engine: Engine | None = None
        self._tokens = self._tokens_logged = 0
        # Upstream then counts the supervised tokens of a step, and leaves the loss as we return it.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of a batch, and count its tokens, which the collator knows, so that no device has to be asked."""
        assert not return_outputs
        self._tokens += inputs["tokens"]
        # The items are those of all processes, and DDP takes the mean of their gradients.
        processes: int = self.accelerator.num_processes
        return training_loss(model, inputs, num_items_in_batch, self._head) * processes

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return nothing: upstream walks over all parameters for every batch, for a figure that nobody reads."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the tokens of all processes up to now."""
        tokens = torch.tensor(self._tokens - self._tokens_logged, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))
        self._tokens_logged = self._tokens
        logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        if start_time is not None:
            logs |= speed_metrics("train", start_time, num_tokens=self._tokens * self.accelerator.num_processes)  # type: ignore[no-untyped-call]
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluate on `eval_dataset`: the mean over supervised tokens, whatever the batches (upstream averages batches).

        Returns:
            `eval_loss`, in nats per supervised token, and `eval_seconds`.
        """
        start = time.perf_counter()
        model = self.model_wrapped if self.is_in_train else self.accelerator.prepare_model(self.model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        losses, counts = [], []
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            loss, count = self.accelerator.gather_for_metrics(row_losses(model, batch, self._head))
            losses.append(loss)
            counts.append(count)
        model.train(was_training)
        mean = (torch.cat(losses).double().sum() / torch.cat(counts).double().sum()).item()
        metrics = {f"{metric_key_prefix}_loss": mean, f"{metric_key_prefix}_seconds": time.perf_counter() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave a sharded model where it is: it may lie in the CPU's memory on purpose."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap a sharded model ourselves: accelerate takes shards and DistributedDataParallel for a contradiction."""
        if training and self._zero is not None:
            assert isinstance(model, PeftModel)
            assert self.optimizer is not None
            self._engine = hand_over(model, self.optimizer, self._zero)
            if is_sharded(model):
                self._head = separable_head(model)  # before, nothing could be asked of it
            wrapped: nn.Module = self._engine.model
            return wrapped
        if training and isinstance(model, PeftModel) and is_sharded(model):
            return replicate(model, self.args.device)
        return super()._wrap_model(model, training, dataloader)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self._engine else super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm. DeepSpeed clips within its step, so that it is made here, and leaves the Trainer's no gradient."""
        if self._engine:
            return self._engine.step()
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._engine.whole_state(self.args.should_save) if self._engine else contextlib.nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._engine:
            self._engine.hand_out_state()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert isinstance(self.model, nn.Module)
        put_away(self.model)
        with whole_factors(self.model):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and output_dir is not None and isinstance(self.model, PeftModel):
            pissa.convert(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Where PiSSA goes on, the weights are there already, from a form that upstream does not take.
        if not (isinstance(self.model, PeftModel) and pissa.is_pissa(self.model)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_train_sampler(self, *args: Any) -> Sampler[int] | None:
        """Return upstream's sampler, or ours: upstream's grouping sorts the batches too, and knows neither seed nor epoch."""
        if not self._group_by_length:
            return super()._get_train_sampler(*args)
        return _Grouped(self)


class _Grouped(Sampler[int]):
    """Rows in an order that depends on the recipe's seed and the epoch alone."""

    def __init__(self, trainer: AbbaTrainer) -> None:
        self._trainer = trainer
        assert isinstance(trainer.train_dataset, Dataset)
        rows = trainer.train_dataset.with_format("arrow")[:]
        self._lengths: list[int] = pc.list_value_length(rows["input_ids"]).to_pylist()

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        args, epoch = self._trainer.args, int(self._trainer.state.epoch or 0)
        return iter(grouped_by_length(self._lengths, args.train_batch_size * args.world_size, args.seed + epoch))


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
