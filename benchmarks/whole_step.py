"""What `abba train` adds to a step: its real path beside a bare PyTorch loop over the same batches, layers, loss and optimizer.

    python benchmarks/whole_step.py [--rounds 5] [--steps 4] [--model smollm2|tiny|both]

Both run in one process and take turns, a few steps each; every round begins with the same factors, and must give the same losses.
The bare loop makes batches of the rows that it is handed, computes, clips and steps; `abba train` besides draws and reads rows,
counts tokens, and writes its metrics at every step. The tiny model computes almost nothing: its difference is the overhead
itself.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from abba_cli import adapting, load_recipe, loading, preparation, training
from abba_cli.bases import find_base
from abba_cli.batches import PaddedBatches
from abba_cli.events import Stepped
from abba_cli.head import separable_head
from abba_cli.loss import SupervisedBatches, training_loss

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "whole-step.jsonl"
Losses = list[float]
Seconds = list[float]


def main() -> None:
    """Measure the models, record them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a round, after one that warms up")
    parser.add_argument("--model", choices=["smollm2", "tiny", "both"], default="both")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    print("| model | bare loop | abba train | ratio | difference a step | tokens/s | largest difference of the losses |")
    print("|---|---|---|---|---|---|---|")
    for name in ["tiny", "smollm2"] if options.model == "both" else [options.model]:
        steps = options.steps * (20 if name == "tiny" else 1)
        with tempfile.TemporaryDirectory() as folder:
            row = {"model": name, **measured(name, Path(folder), options.rounds, steps)}
        row |= {"rounds": options.rounds, "steps": steps, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        row |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__}
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(
            f"| {name} | {row['bare_ms']:.1f} ms | {row['abba_ms']:.1f} ms | {row['ratio']:.3f} | {row['difference_ms']:.1f} ms "
            f"| {row['tokens_per_second']:.0f} | {row['loss_difference']:.1e} |",
            flush=True,
        )


def measured(name: str, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Run the rounds; medians over rounds of ratios within a round, since its ways shared the same moments."""
    changes = [f"output={folder / 'run'}", f"training.max_steps={steps + 1}", "training.scheduler=constant"]
    changes += ["training.warmup_ratio=0", "checkpoints.every_steps=100000"]
    recipe_file = HERE.parent / "recipes" / "quickstart.yaml"
    if name == "tiny":
        changes += [f"model.name={tiny_model(load_recipe(recipe_file, []), folder / 'tiny')}", "model.gguf_file=null"]
    recipe = load_recipe(recipe_file, changes)
    ready = preparation.prepare(recipe, restart=True, read_weights=True)
    set_seed(0)
    model = adapting.attach_adapter(loading.load_model(ready.base, recipe.model), recipe.adapter, ready.base)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items() if "abba_" in key}
    batches: list[list[Any]] = []

    def real() -> tuple[Losses, Seconds]:
        losses, moments = [], []

        def listen(event: Any) -> None:
            if isinstance(event, Stepped):
                losses.append(event.loss)
                moments.append(time.perf_counter())

        ready.run.clear()
        with mock.patch.object(training, "SupervisedBatches", lambda *given: recording(SupervisedBatches(*given), batches)):
            training.fit(model, ready, listen)
        return losses, seconds_between(moments)

    ways: dict[str, Callable[[], tuple[Losses, Seconds]]] = {
        "abba": real,
        "bare": lambda: bare_loop(recipe, model, ready, batches[: steps + 1]),
    }
    losses: dict[str, list[Losses]] = {way: [] for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            model.load_state_dict(start, strict=False)
            batches[:] = [] if way == "abba" else batches
            set_seed(0)
            found, seconds = run()
            losses[way].append(found)
            if turn:  # the first round warms up
                times[way].append(statistics.median(seconds))
    pairs = list(zip(times["abba"], times["bare"], strict=True))
    tokens = sum(SupervisedBatches(PaddedBatches(0))(rows)["tokens"] for rows in batches[1 : steps + 1]) / steps
    made = {
        "bare_ms": 1e3 * statistics.median(times["bare"]),
        "abba_ms": 1e3 * statistics.median(times["abba"]),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
        "difference_ms": 1e3 * statistics.median(ours - theirs for ours, theirs in pairs),
        "tokens_per_second": tokens / statistics.median(times["abba"]),
        "loss_difference": max(abs(a - b) for a, b in zip(losses["abba"][-1], losses["bare"][-1], strict=True)),
    }
    return {key: round(value, 9 if key == "loss_difference" else 4) for key, value in made.items()}


def bare_loop(recipe: Any, model: Any, ready: Any, batches: list[list[Any]]) -> tuple[Losses, Seconds]:
    """Train on the batches, a step each, with nothing around."""
    model.train()
    head = separable_head(model.get_base_model())
    collate = SupervisedBatches(PaddedBatches(ready.tokenizer.pad_token_id))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.training.learning_rate, weight_decay=0.0, fused=True)
    losses, moments = [], []
    for rows in batches:
        batch = {
            key: value.to(model.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in collate(rows).items()
        }
        loss = training_loss(model, batch, None, head)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        moments.append(time.perf_counter())
    return losses, seconds_between(moments)


def recording(collate: SupervisedBatches, batches: list[list[Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """The collator, which remembers the rows of its batches."""

    def made(rows: list[Any]) -> dict[str, Any]:
        batches.append(rows)
        return collate(rows)

    return made


def tiny_model(recipe: Any, folder: Path) -> Path:
    """A Llama of two small blocks with the quickstart's tokenizer, as a model directory."""
    tokenizer = loading.load_tokenizer(find_base(recipe.model), recipe.model)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def seconds_between(moments: list[float]) -> Seconds:
    """Seconds of every step but the first."""
    return [after - before for before, after in itertools.pairwise(moments)]


if __name__ == "__main__":
    main()
