"""How fast an unmerged adapter decodes: merged, ABBA with and without the kept weight, and PEFT's LoRA. On SmolLM2-135M.

    python benchmarks/decoding.py [--rounds 5] [--tokens 64]

Tokens per second are the batch over the median step of a round, of which the median is taken.
One process; the four models take turns token by token, so that whatever else the machine does falls on all of them alike. The
prompt's time is left out. The adapters are fresh (their update is zero), which makes no difference to the work. Every model
feeds the same token again and again: its choice costs the same everywhere. Appends a row for each way and batch size to
results/decoding.jsonl and prints the table.
"""

import argparse
import copy
import json
import os
import statistics
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model

from abba_cli import load_recipe
from abba_cli.adapter import AbbaConfig
from abba_cli.bases import dequantised, find_base
from abba_cli.loading import load_model, load_tokenizer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "decoding.jsonl"
PROMPT = "Tom has 3 boxes with 4 pens each. He gives 5 pens to Ann. How many pens does Tom have left? Think step by step."
MERGED, KEPT, WITHOUT, LORA = "merged", "ABBA, unmerged", "ABBA, unmerged, no weight kept", "LoRA r = 32, unmerged"


def main() -> None:
    """Measure both batch sizes, record them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    recipe = load_recipe(HERE.parent / "recipes" / "quickstart.yaml", [])
    base = dequantised(find_base(recipe.model), recipe.model)
    tokenizer = load_tokenizer(base, recipe.model)
    models = {name: model.eval() for name, model in made(lambda: load_model(base, recipe.model)).items()}
    print("| way | batch | tokens/s | ratio | slowest, fastest round | first step (s) |")
    print("|---|---|---|---|---|---|")
    for batch in (1, 4):
        ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * batch)
        rounds = [one_round(models, ids, options.tokens) for _ in range(options.rounds)]
        firsts = rounds[0]
        speeds = {name: [batch / statistics.median(one[name][1:]) for one in rounds] for name in models}
        for name, values in speeds.items():
            row = {
                "way": name,
                "batch": batch,
                "new_tokens": options.tokens,
                "rounds": options.rounds,
                "tokens_per_second": round(statistics.median(values), 2),
                # Of each round, since a round's models shared the same moments.
                "ratio": round(statistics.median(a / b for a, b in zip(values, speeds[MERGED], strict=True)), 3),
                "slowest_round": round(min(values), 2),
                "fastest_round": round(max(values), 2),
                "first_step_seconds": round(firsts[name][0], 3),
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
            }
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            spread = f"{row['slowest_round']}, {row['fastest_round']}"
            print(f"| {name} | {batch} | {row['tokens_per_second']} | {row['ratio']} | {spread} | {row['first_step_seconds']} |")


def made(load: Any) -> dict[str, Any]:
    """The four models, each with weights of its own."""
    settings: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    abba = AbbaConfig(r1=16, r2=16, init_weights="random", **settings)
    return {
        MERGED: get_peft_model(load(), copy.deepcopy(abba)).merge_and_unload(),
        KEPT: get_peft_model(load(), copy.deepcopy(abba)),
        WITHOUT: get_peft_model(load(), copy.deepcopy(abba)),
        LORA: get_peft_model(load(), LoraConfig(r=32, **settings)),
    }


@torch.inference_mode()
def one_round(models: dict[str, Any], ids: torch.Tensor, tokens: int) -> dict[str, list[float]]:
    """Seconds of every step of each model: one after the prompt, then `tokens` more."""
    pasts = {}
    for name, model in models.items():
        with switched(name):
            pasts[name] = model(input_ids=ids, use_cache=True).past_key_values
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(tokens + 1):
        # Another order each time: nobody always follows the same neighbour.
        names = list(models)[step % len(models) :] + list(models)[: step % len(models)]
        for name in names:
            with switched(name):
                start = time.perf_counter()
                models[name](input_ids=ids[:, -1:], past_key_values=pasts[name], use_cache=True)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def switched(name: str) -> AbstractContextManager[object]:
    """Takes the kept weight away from the model that is measured without it."""
    if name != WITHOUT:
        return nullcontext()
    return mock.patch("abba_cli.adapter.linear.is_decoding_step", return_value=False)


if __name__ == "__main__":
    main()
