"""A tiny base, an adapter on it, and small test sets, for evaluations end to end."""

import json
import random
from pathlib import Path

import pytest
from models import write_adapter, write_model


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions of four choices and one program in the sources' own columns, and a task of our own: 12 sums."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(5)
    choices = [{"text": ["a cat", "a dog", "a cow", "a hen"], "label": list("ABCD")} for _ in range(60)]
    arc = [
        {"question": f"Which one is number {number}?", "choices": one, "answerKey": draw.choice("ABCD")}
        for number, one in enumerate(choices)
    ]
    sums = [{"question": f"What is {a} + {a}?", "answer": f"{a} and {a}.\n#### {2 * a}"} for a in range(12)]
    program = {
        "task_id": "HumanEval/0",
        "prompt": "def double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    }
    (folder / "sums.yaml").write_text(
        "name: sums\ndata: {path: sums/test.jsonl}\nprompt: '{{ question }}'\nanswer: '{{ answer }}'\nmetric: number\n"
        "max_tokens: 12\n"
    )
    for place, rows in {"arc_c/test": arc, "sums/test": sums, "humaneval/HumanEval": [program]}.items():
        file = folder / f"{place}.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", tiny_llama)


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "trained", base)
