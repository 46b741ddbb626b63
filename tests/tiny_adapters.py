"""Tiny bases on disk, ABBA adapters on them, and stock PEFT in a process of its own to hold an export against."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from abba_cli.adapter import AbbaConfig
from abba_cli.bases import Base
from abba_cli.loading import load_config
from abba_cli.recipe import ModelSection
from abba_cli.recorded_base import LayerKind, fit
from abba_cli.saved_adapter import SavedAdapter, open_adapter

VOCABULARY = 61
IDS = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(7))
# Sizes that no power of two divides, m != n, and fewer key heads than query heads.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 64}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    # bitsandbytes quantises in blocks of 64.
    "llama64": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2})
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, head_dim=10)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES | {"tie_word_embeddings": True}, head_dim=12)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2)),
}


@dataclass(frozen=True)
class Made:
    """An adapter on disk, and what its model computes."""

    base: Path
    path: Path
    logits: torch.Tensor
    base_logits: torch.Tensor
    nf4: bool = False

    @property
    def saved(self) -> SavedAdapter:
        return open_adapter(self.path)

    @property
    def kinds(self) -> dict[str, LayerKind]:
        return dict(fit(self.saved, load_config(Base(str(self.base)), ModelSection(name="base"))))


def make_base(architecture: str, folder: Path) -> Path:
    """A random model of an architecture; biases, which start at zero, get values."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = ARCHITECTURES[architecture]()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path, nf4: bool = False) -> PreTrainedModel:
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    settings = {"quantization_config": four_bit} if nf4 else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model.eval()(IDS).logits
    return result.float()


def make_adapter(base: Path, folder: Path, nf4: bool = False, **settings: Any) -> Made:
    """An adapter that changes the model a lot; everything trainable gets random values."""
    settings = {"r1": 3, "r2": 5, "alpha": 4.0, "target_modules": "all-linear", "init_weights": False} | settings
    model = load_base(base, nf4)
    base_logits = logits_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        adapted = get_peft_model(model, AbbaConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ".abba_" not in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif parameter.requires_grad:
                parameter.data = 2 * parameter if parameter.any() else 0.005 * torch.randn_like(parameter)
    logits = logits_of(adapted)
    with warnings.catch_warnings():
        # PEFT saves both embeddings whole where lm_head is adapted, and says so.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        adapted.save_pretrained(folder)
    assert difference(base_logits, logits) > 0.1, "an adapter that changes little shows nothing"
    return Made(base, folder, logits, base_logits, nf4)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def dense_delta(saved: SavedAdapter, layer: str) -> torch.Tensor:
    """dW of a layer, (m, n) in float64, straight from the formula with the configuration's numbers."""
    B1, A1, B2, A2 = (factor.double() for factor in saved.factors(layer))
    one = torch.einsum("ik,kj->ij", B1, A1)
    two = torch.einsum("ik,kj->ij", B2, A2)
    return saved.layers[layer].s * one * two


def changed(source: Path, folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> SavedAdapter:
    """A copy of an adapter in which every tensor with `part` in its key is another."""
    target = folder / "changed"
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {key: change(value) if part in key else value for key, value in tensors.items()}
    save_file(tensors, target / "adapter_model.safetensors")
    return open_adapter(target)


_STOCK = """
import json, os, sys, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules["abba_cli"] = None
warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys and of settings that do not fit
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging
logging.disable_progress_bar()
jobs, ids, target = json.load(sys.stdin)
found = []
for base, adapter, nf4 in jobs:
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    settings = {"quantization_config": four_bit} if nf4 else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **settings)
        model = PeftModel.from_pretrained(model, adapter).eval()
    except Exception as error:
        raise RuntimeError(f"{adapter} cannot be loaded") from error
    with torch.no_grad():
        found.append(model(torch.tensor(ids)).logits.float())
torch.save(found, target)
"""


def stock_logits(jobs: Sequence[tuple[Made, Path]], target: Path) -> list[torch.Tensor]:
    """What PEFT alone computes: for each job, the first's base with the exported adapter of the second."""
    request = [[str(made.base), str(exported), made.nf4] for made, exported in jobs]
    done = subprocess.run(
        [sys.executable, "-c", _STOCK],
        input=json.dumps([request, IDS.tolist(), str(target)]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits: list[torch.Tensor] = torch.load(target, weights_only=True)
    assert len(logits) == len(jobs)
    return logits
