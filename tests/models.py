"""Real tiny models of several architectures on disk, and adapters for them that look trained."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from abba_cli.adapter import AbbaConfig

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough for the layers to matter in the logits.
    "initializer_range": 0.1,
}
CONFIGS: dict[str, type] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gpt2": GPT2Config,
}
LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {name: ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else LLAMA_LAYERS for name in CONFIGS}
PROMPT = "Tom has 3 pens and buys 4 more. How many pens does he have?"

OUTCOME = {
    "steps": 6,
    "planned_steps": 6,
    "used_step": 6,
    "seconds": 8.0,
    "peak_memory_bytes": 1_000_000_000,
    "train_loss": 1.0,
    "eval_loss_before": None,
    "eval_loss": None,
}
"""Of a finished run, in its provenance.json."""


def write_model(folder: Path, tokenizer_from: Path, architecture: str = "llama", dtype: str = "float32", **settings: Any) -> Path:
    """Write a random two-layer model with the tokenizer of another folder; `max_shard_size` cuts it into files."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    limit = settings.pop("max_shard_size", "5GB")
    sizes = dict(SMALL)
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1, "n_positions": 512}
    elif architecture in ("gemma2", "qwen3"):
        sizes["head_dim"] = 8
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CONFIGS[architecture](vocab_size=len(tokenizer), **{**sizes, **tokens, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(folder, max_shard_size=limit)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Path:
    """Write an adapter with four random factors in every layer, and random changes of what is trained whole."""
    config = AutoConfig.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r1": 3, "r2": 2, "alpha": 1.5, "target_modules": TARGETS[config.model_type], "task_type": "CAUSAL_LM"} | settings
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, AbbaConfig(init_weights=False, **given))
        assert isinstance(adapted, PeftModel)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".abba_B2." in name:
                    parameter.mul_(2)  # far enough from the base for the rounding of a weight to be small beside it
                elif parameter.requires_grad and ".abba_" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(str(folder))
    return folder


def adapted_logits(
    base: Path, *adapters: Path, weights: tuple[float, ...] = (), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits of base + adapters for the prompt, through PEFT, in float32 or another type."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], start=1):
        model.load_adapter(folder, adapter_name=str(number))
    if len(adapters) > 1:
        model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    for number, weight in enumerate(weights):
        for module in model.modules():
            if hasattr(module, "abba_A1"):
                module.set_scale(str(number), weight)
    return logits(model, base)


def logits(model: Any, tokenizer_from: Path) -> torch.Tensor:
    """Logits (positions, vocabulary) of a model for the prompt."""
    tokens = AutoTokenizer.from_pretrained(tokenizer_from)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens).logits[0].float()
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the expected values' standard deviation."""
    return float((found - expected).abs().max() / expected.std())
