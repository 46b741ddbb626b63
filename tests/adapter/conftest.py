"""Real, tiny, randomly initialised models of several architectures, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma2")

ModelMaker = Callable[..., PreTrainedModel]


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the same tiny model every time it is called, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        if architecture == "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SMALL))
        elif architecture == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
        elif architecture == "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=12, attn_implementation="eager"))
        else:
            gpt2 = GPT2Config(
                vocab_size=VOCABULARY, n_embd=36, n_layer=2, n_head=3, n_positions=64, bos_token_id=1, eos_token_id=2
            )
            gpt2.loss_type = "ForCausalLM"
            model = GPT2LMHeadModel(gpt2)
    return model.to(dtype).eval()


@pytest.fixture
def tiny() -> ModelMaker:
    return make_model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
