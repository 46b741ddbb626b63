"""Rows in the columns of the harness's sources, and a random model to score on them."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from abba_cli.prompts import load_template
from abba_cli.speakers import Speaker

WORDS = "river stone lamp paper cloud wheel garden bottle ladder winter engine silver market pepper candle forest".split()


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


Settings = Callable[..., dict[str, Any]]


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
