"""How fast `abba eval` generates beside lm-evaluation-harness's own transformers backend: same model, rows, batch size, lengths.

    python benchmarks/evaluation_engine.py QUESTIONS.jsonl [--rounds 5] [--rows 32] [--batch-size 8] [--tokens 96]

QUESTIONS has a column `question` (GSM8K's test.jsonl, say). SmolLM2-135M-Instruct answers greedily, in its chat template,
until it ends or the longest length. Both take the same finished prompts; they take turns in one process, in another order
each round. Scored twice: the base, and the base with an adapter, which abba merges in place once (a copy and that merge are
timed apart) and the harness takes as it is, where our `generate` keeps its weights from the first round on. Counts the
answers that are the same text. Appends a row for each to results/evaluation-engine.jsonl and prints the table.
"""

import argparse
import copy
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import get_peft_model

from abba_cli import load_recipe
from abba_cli.adapter import AbbaConfig
from abba_cli.bases import dequantised, find_base
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Request, answer_batches, plan_batches
from abba_cli.loading import load_model, load_tokenizer
from abba_cli.prompts import load_template
from abba_cli.speakers import Speaker

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "evaluation-engine.jsonl"
STOP = "Instruction:"


def main() -> None:
    """Measure both models, record them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    recipe = load_recipe(HERE.parent / "recipes" / "quickstart.yaml", [])
    base = dequantised(find_base(recipe.model), recipe.model)
    tokenizer = load_tokenizer(base, recipe.model)
    model = load_model(base, recipe.model).eval()  # type: ignore[no-untyped-call]
    lines = options.questions.read_text(encoding="utf-8").splitlines()[: options.rows]
    asked = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    texts = [str(tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)) for one in asked]
    adapted = adapt(copy.deepcopy(model))
    start = time.perf_counter()
    merged = copy.deepcopy(adapted).merge_and_unload()
    merging = time.perf_counter() - start
    print("| model | abba, s | harness, s | abba's speed / harness's | the same text |\n|---|---|---|---|---|")
    for name, ours, theirs in (("base", model, model), ("base + unmerged adapter", merged, adapted)):
        ways: dict[str, Callable[[], list[str]]] = {
            "abba": lambda ours=ours: by_abba(ours, tokenizer, texts, options),  # type: ignore[misc]
            "harness": lambda theirs=theirs: by_harness(theirs, tokenizer, texts, options),  # type: ignore[misc]
        }
        rounds = []
        for turn in range(options.rounds + 1):
            seconds, said = {}, {}
            for way in sorted(ways, reverse=turn % 2 == 1):
                start = time.perf_counter()
                said[way] = ways[way]()
                seconds[way] = time.perf_counter() - start
            if turn:  # the first round warms up
                rounds.append(seconds)
        same = sum(a.strip() == b.strip() for a, b in zip(said["abba"], said["harness"], strict=True))
        row = {
            "model": name,
            "seconds_abba": round(statistics.median(one["abba"] for one in rounds), 2),
            "seconds_harness": round(statistics.median(one["harness"] for one in rounds), 2),
            "ratio": round(statistics.median(one["harness"] / one["abba"] for one in rounds), 3),
            "ratios": [round(one["harness"] / one["abba"], 3) for one in rounds],
            "seconds_merging": 0.0 if ours is theirs else round(merging, 2),
            "same_text": f"{same} of {len(texts)}",
            "batch_size": options.batch_size,
            "new_tokens": options.tokens,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"| {name} | {row['seconds_abba']} | {row['seconds_harness']} | {row['ratio']} | {row['same_text']} |", flush=True)


def by_abba(model: Any, tokenizer: Any, texts: list[str], options: argparse.Namespace) -> list[str]:
    """Answers through abba's engine, tokenising included."""
    speaker = Speaker("", model, load_template("none", tokenizer))
    requests = [
        Request(number, tuple(tokenizer(text)["input_ids"]), (STOP,), options.tokens) for number, text in enumerate(texts)
    ]
    found = [""] * len(texts)
    for batch in answer_batches(speaker, plan_batches(requests, options.batch_size), Decoding()):
        for one in batch:
            found[one.number] = one.text
    return found


def by_harness(model: Any, tokenizer: Any, texts: list[str], options: argparse.Namespace) -> list[str]:
    """Answers through the harness's own backend."""
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    settings = {"until": [STOP], "max_gen_toks": options.tokens, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, settings), number) for number, text in enumerate(texts)]
    return list(backend.generate_until(requests, disable_tqdm=True))


def adapt(model: Any) -> Any:
    """The model with a random adapter of r1 = r2 = 16 in every linear layer, small enough to leave it fluent."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    config = AbbaConfig(r1=16, r2=16, alpha=1.0, target_modules=names, task_type="CAUSAL_LM", init_weights=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".abba_" in name:
                parameter.mul_(0.1)
    return adapted.eval()


if __name__ == "__main__":
    main()
