"""Rows in the columns of the harness's sources, and a small tokenizer and random model to score on them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from abba_cli.prompts import load_template
from abba_cli.speakers import Speaker

WORDS = ["river", "stone", "lamp", "paper", "cloud", "wheel", "garden", "bottle", "ladder", "winter", "engine", "silver"]


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of some 400 tokens: hundreds of prompts take a second with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2])
    whole.save_pretrained(folder)
    return folder


def load_speaker(folder: Path, **settings: Any) -> Speaker:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.max_new_tokens = None
    return Speaker("tiny", model, load_template("none", AutoTokenizer.from_pretrained(folder)), **settings)


def arc_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Four choices of random words and lengths; the right one stands anywhere."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))

    return [
        {
            "id": str(number),
            "question": f"Which is number {number} of {text()}?",
            "choices": {"text": [text() for _ in "ABCD"], "label": list("ABCD")},
            "answerKey": draw.choice("ABCD"),
        }
        for number in range(count)
    ]


def gsm8k_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    numbers = [(draw.randint(1, 30), draw.randint(1, 30)) for _ in range(count)]
    return [
        {"question": f"Ann has {a} pens and buys {b}. How many has she?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a, b in numbers
    ]


def write_rows(folder: Path, split: str, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(cache: Path, data_dir: Path | None, **changes: Any) -> dict[str, Any]:
    """Arguments of score_with_harness."""
    return {
        "fingerprint": "f00",
        "cache": cache,
        "limit": None,
        "shots": 0,
        "seed": 1234,
        "batch_size": 8,
        "data_dir": data_dir,
        "chat_template": False,
        "notify": lambda event: None,
    } | changes
