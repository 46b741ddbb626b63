"""ABBA against PEFT's LoRA at equal parameters: recipes/gsm8k-smollm2.yaml, same script, same rows in the same order.

    python benchmarks/gsm8k_smollm2.py --data DIR            runs what is missing in the sweep, then prints the table
    python benchmarks/gsm8k_smollm2.py --data DIR --only abba:2e-3

DIR holds GSM8K's train.jsonl and test.jsonl. Each run is appended to benchmarks/results/gsm8k-smollm2.jsonl.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from abba_cli import adapting, load_recipe, loading, preparation, training
from abba_cli.events import Evaluated, Event, Stepped

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gsm8k-smollm2.jsonl"
# LoRA r = 32 has (32)(m + n) parameters a layer, ABBA r1 = r2 = 16 the same. lora_alpha = r makes LoRA's scale 1.
SWEEP = [(method, rate) for rate in ("2e-3", "1e-3", "4e-3") for method in ("abba", "lora")]


def run_one(method: str, rate: str, data: Path, quantization: str) -> dict[str, Any]:
    """Train once and return the row of the table."""
    overrides = [
        f"data.train.0.path={data / 'train.jsonl'}",
        f"data.eval.0.path={data / 'test.jsonl'}",
        f"training.learning_rate={rate}",
        f"model.quantization={quantization}",
        "evaluation.every_steps=null",
        # A fresh adapter changes nothing, so the loss at the start is the same for all: one run of each method takes it.
        f"evaluation.at_start={rate == '2e-3'}",
        f"output=out/bench-gsm8k/{method}-{rate}-{quantization}",
    ]
    recipe = load_recipe(HERE.parent / "recipes" / "gsm8k-smollm2.yaml", overrides)
    ready = preparation.prepare(recipe, restart=True, read_weights=True)
    ready.run.clear()
    ready.run.path.mkdir(parents=True, exist_ok=True)
    set_seed(recipe.training.seed)
    model = loading.load_model(ready.base, recipe.model)
    if method == "abba":
        adapted = adapting.attach_adapter(model, recipe.adapter, ready.base)
    else:
        lora = LoraConfig(r=32, lora_alpha=32, target_modules=list(recipe.adapter.targets), task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, lora)
        assert isinstance(wrapped, PeftModel)
        adapted = wrapped
    losses: list[float] = []
    evaluations: dict[int, float] = {}

    def listen(event: Event) -> None:
        if isinstance(event, Stepped):
            losses.append(event.loss)
            print(
                f"{method} {rate} step {event.step} loss {event.loss:.4f} {event.tokens_per_second:.0f} tokens/s",
                flush=True,
            )
        elif isinstance(event, Evaluated):
            evaluations[event.step] = event.loss
            print(f"{method} {rate} step {event.step} evaluation loss {event.loss:.4f}", flush=True)

    start = time.perf_counter()
    training.fit(adapted, ready, listen)
    return {
        "method": method,
        "learning_rate": float(rate),
        "quantization": quantization,
        "trainable": sum(one.numel() for one in adapted.parameters() if one.requires_grad),
        "evaluation_loss": {str(step): loss for step, loss in evaluations.items()},
        "training_loss_last_10": sum(losses[-10:]) / 10,
        "seconds": round(time.perf_counter() - start, 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "data_fingerprint": ready.data.fingerprint[:16],
    }


def main() -> None:
    """Run what is asked for or missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", help="METHOD:RATE, such as lora:1e-3")
    parser.add_argument("--quantization", choices=["none", "nf4", "int8"], default="none")
    options = parser.parse_args()
    wanted = [tuple(options.only.split(":"))] if options.only else SWEEP
    for method, rate in wanted:
        done = {(row["method"], row["learning_rate"], row["quantization"]) for row in results()}
        if (method, float(rate), options.quantization) not in done:
            row = run_one(method, rate, options.data, options.quantization)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    print("| method | base | learning rate | evaluation loss before | after 100 steps |")
    print("|---|---|---|---|---|")
    before = next(row["evaluation_loss"]["0"] for row in results() if "0" in row["evaluation_loss"])
    for row in sorted(results(), key=lambda row: (row["quantization"], row["method"], row["learning_rate"])):
        losses = " | ".join(f"{row['evaluation_loss'].get(step, before):.4f}" for step in ("0", "100"))
        print(f"| {row['method']} | {row['quantization']} | {row['learning_rate']:g} | {losses} |")
    if not options.only:
        draw(results())


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the sweep: evaluation loss against learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    looks = {"abba": ("ABBA r1 = r2 = 16", "#1f5a99", "o"), "lora": ("LoRA r = 32", "#c8501e", "s")}
    plain = sorted((row for row in rows if row["quantization"] == "none"), key=lambda row: row["learning_rate"])
    for method, (label, colour, marker) in looks.items():
        points = [(row["learning_rate"], row["evaluation_loss"]["100"]) for row in plain if row["method"] == method]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker)
    axes.set_xscale("log")
    rates = sorted({row["learning_rate"] for row in plain})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    before = next(row["evaluation_loss"]["0"] for row in plain if "0" in row["evaluation_loss"])
    axes.set(
        xlabel="peak learning rate",
        ylabel="loss on 200 test rows (nats per token)",
        title=f"SmolLM2-135M on GSM8K, 100 steps of 2 rows, {plain[0]['trainable']:,} parameters (before: {before:.3f})",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(HERE.parent / "docs" / "images" / "gsm8k-smollm2.png", dpi=150)


def results() -> list[dict[str, Any]]:
    """The rows recorded so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


if __name__ == "__main__":
    main()
