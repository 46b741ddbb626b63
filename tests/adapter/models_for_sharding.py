"""The model and the rows of the FSDP2 test, the same in every process."""

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import abba_cli.adapter  # noqa: F401  (teaches PEFT the method)
from abba_cli.adapter import AbbaConfig


def adapted_model(dtype: torch.dtype, checkpointing: bool) -> PeftModel:
    """A two-layer Llama with odd sizes and random factors in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1
    )
    base = LlamaForCausalLM(config).to(dtype)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(base, AbbaConfig(r1=4, r2=3, alpha=4, target_modules=targets, init_weights=False))
    assert isinstance(adapted, PeftModel)
    return adapted.train()


def batch() -> torch.Tensor:
    """Token ids, (4, 12)."""
    return torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(1))
