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


def pytest_configure(config: pytest.Config) -> None:
    # PEFT 0.21.2 reads a property that transformers 5.23 has renamed; ends with the PEFT that follows.
    # The functions' new names came with transformers 5.23, too, and PEFT's wrapper has the old one only.
    config.addinivalue_line("filterwarnings", "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


ModelMaker = Callable[..., PreTrainedModel]


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **sizes: int) -> PreTrainedModel:
    """Returns the same tiny model every time it is called, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        if architecture == "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SMALL | sizes))
        elif architecture == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
        elif architecture == "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=12, attn_implementation="eager"))
        else:
            gpt2 = GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=36,
                n_layer=2,
                n_head=3,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
                resid_pdrop=0.0,  # so that training mode can be compared, too
                embd_pdrop=0.0,
                attn_pdrop=0.0,
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
