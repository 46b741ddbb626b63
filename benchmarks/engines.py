"""Which engine runs the loop: TRL's SFTTrainer, transformers' Trainer, or Trainer with this project's loss. On the quickstart.

    pip install trl
    python benchmarks/engines.py [--rounds 5] [--steps 4]

The same model, rows, collator and optimizer in one process; the engines take turns, each with a few steps a round. Prints the
median step of each, as a ratio to Trainer.
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from abba_cli import adapting, load_recipe, loading, preparation
from abba_cli.batches import PaddedBatches
from abba_cli.loop import AbbaTrainer
from abba_cli.loss import SupervisedBatches

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


class Clock(TrainerCallback):
    """Times every step but the first of a round, which warms up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    recipe = load_recipe(RECIPE, ["output=out/bench-engines", f"training.max_steps={options.steps + 1}"])
    ready = preparation.prepare(recipe, restart=True, read_weights=True)
    set_seed(0)
    model = adapting.attach_adapter(loading.load_model(ready.base, recipe.model), recipe.adapter, ready.base)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items() if "abba_" in name}
    pad_id = ready.tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    common: dict[str, Any] = {
        "output_dir": "out/bench-engines",
        "max_steps": options.steps + 1,
        "per_device_train_batch_size": recipe.training.batch_size,
        "learning_rate": recipe.training.learning_rate,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }

    def plain(clock: Clock) -> Any:
        arguments = TrainingArguments(**common)
        return Trainer(model, arguments, PaddedBatches(pad_id), ready.data.train, callbacks=[clock])

    def ours(clock: Clock) -> Any:
        return AbbaTrainer(
            model=model,
            args=TrainingArguments(**common),
            data_collator=SupervisedBatches(PaddedBatches(pad_id)),
            train_dataset=ready.data.train,
            callbacks=[clock],
        )

    def trl(clock: Clock) -> Any:
        # Its defaults of autocast and gradient checkpointing are off: they would cost more still.
        arguments = SFTConfig(**common, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
        return SFTTrainer(
            model,
            arguments,
            data_collator=PaddedBatches(pad_id),
            train_dataset=ready.data.train,
            processing_class=ready.tokenizer,
            callbacks=[clock],
        )

    engines = {"Trainer": plain, "Trainer, our loss": ours, "SFTTrainer": trl}
    clocks: dict[str, list[Clock]] = {name: [] for name in engines}
    for _ in range(options.rounds):
        for name, make in engines.items():
            model.load_state_dict(start, strict=False)
            clock = Clock()
            set_seed(0)
            trainer = make(clock)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            clocks[name].append(clock)
    medians = {name: statistics.median(second for clock in rounds for second in clock.seconds) for name, rounds in clocks.items()}
    print("| engine | median step (s) | ratio | losses of the first round |")
    print("|---|---|---|---|")
    for name, median in medians.items():
        losses = " ".join(f"{loss:.4f}" for loss in clocks[name][0].losses)
        print(f"| {name} | {median:.3f} | {median / medians['Trainer']:.2f} | {losses} |")


if __name__ == "__main__":
    main()
