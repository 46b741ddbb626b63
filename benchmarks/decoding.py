"""How fast an unmerged adapter generates: merged, ABBA in three ways, and PEFT's LoRA. On SmolLM2-135M.

    python benchmarks/decoding.py [--rounds 5] [--tokens 32]

Times whole calls of `generate`, the prompt included, in one process; the models take turns call by call, in another order each
round, so that whatever else the machine does falls on all of them alike. In each round a model generates twice: first after
everything kept has been dropped, then again. The adapters are fresh (their update is zero), which costs the same.
Appends a row for each way and batch size to results/decoding.jsonl and prints the table.
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
MERGED, ABBA, LOOP = "merged", "ABBA, unmerged", "ABBA, unmerged, a loop of one's own"
WITHOUT, LORA = "ABBA, unmerged, no weight kept", "LoRA r = 32, unmerged"


def main() -> None:
    """Measure both batch sizes, record them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    recipe = load_recipe(HERE.parent / "recipes" / "quickstart.yaml", [])
    base = dequantised(find_base(recipe.model), recipe.model)
    tokenizer = load_tokenizer(base, recipe.model)
    models = {name: model.eval() for name, model in made(lambda: load_model(base, recipe.model)).items()}
    print("| way | batch | tokens/s | ratio | ratio of the first call | slowest, fastest call |")
    print("|---|---|---|---|---|---|")
    for batch in (1, 4):
        ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * batch)
        one_round(models, ids, 4, 0)
        rounds = [one_round(models, ids, options.tokens, turn) for turn in range(options.rounds)]
        for name in models:
            # Ratios within a round, since a round's models shared the same moments.
            first, again = (statistics.median(one[MERGED][at] / one[name][at] for one in rounds) for at in (0, 1))
            speeds = sorted(batch * options.tokens / one[name][1] for one in rounds)
            row = {
                "way": name,
                "batch": batch,
                "new_tokens": options.tokens,
                "rounds": options.rounds,
                "tokens_per_second": round(statistics.median(speeds), 2),
                "ratio": round(again, 3),
                "ratio_first_call": round(first, 3),
                "slowest_call": round(speeds[0], 2),
                "fastest_call": round(speeds[-1], 2),
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
            }
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            spread = f"{row['slowest_call']}, {row['fastest_call']}"
            print(
                f"| {name} | {batch} | {row['tokens_per_second']} | {row['ratio']} | {row['ratio_first_call']} | {spread} |",
                flush=True,
            )


def made(load: Any) -> dict[str, Any]:
    """The four models, each with weights of its own."""
    settings: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    abba = AbbaConfig(r1=16, r2=16, init_weights="random", **settings)
    adapted = get_peft_model(load(), copy.deepcopy(abba))
    return {
        MERGED: get_peft_model(load(), copy.deepcopy(abba)).merge_and_unload(),
        ABBA: adapted,
        # Without PEFT's `generate`, which is told that nothing changes, every step looks for itself.
        LOOP: adapted.get_base_model(),
        WITHOUT: adapted.get_base_model(),
        LORA: get_peft_model(load(), LoraConfig(r=32, **settings)),
    }


def one_round(models: dict[str, Any], ids: torch.Tensor, tokens: int, turn: int) -> dict[str, tuple[float, float]]:
    """Seconds of the first and of the second call of each model."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.train()  # drops what is kept
        model.eval()
    names = list(models)
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        model = models[name]
        for _ in range(2):
            with switched(name):
                start = time.perf_counter()
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    do_sample=False,
                )
                seconds[name].append(time.perf_counter() - start)
        model.train()
        model.eval()
    return {name: (one[0], one[1]) for name, one in seconds.items()}


def switched(name: str) -> AbstractContextManager[object]:
    """Takes the kept weight away from the model that is measured without it."""
    if name != WITHOUT:
        return nullcontext()
    return mock.patch("abba_cli.adapter.linear.is_decoding_step", return_value=False)


if __name__ == "__main__":
    main()
