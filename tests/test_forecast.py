"""The memory forecast against real training steps, really quantised weights and real optimizers."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from abba_cli import adapting, loading
from abba_cli.bases import Base
from abba_cli.batches import IGNORED
from abba_cli.forecast.prediction import OPTIMIZER, RUNTIME, forecast
from abba_cli.forecast.rows import heavy_rows
from abba_cli.head import separable_head
from abba_cli.loss import keeps_logits, training_loss
from abba_cli.recipe import Recipe

SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 1000, "n_embd": 96, "n_layer": 4, "n_head": 3, "n_positions": 1024, "bos_token_id": 1, "eos_token_id": 2}


def make_recipe(rows: int = 3, **settings: Any) -> Recipe:
    """A recipe; settings are section__key."""
    sections: dict[str, Any] = {
        "model": {"name": "unused", "dtype": "float32"},
        "adapter": {"init": "random", "r1": 4, "r2": 3},
        "data": {"train": "unused"},
        "training": {"batch_size": rows},
    }
    for key, value in settings.items():
        section, name = key.split("__")
        sections[section][name] = value
    return Recipe.model_validate({**sections, "output": "unused"})


def make_rows(*lengths: int, packed: bool = False) -> Dataset:
    """Rows of which the last two thirds are learned."""
    rows = []
    for length in lengths:
        row = {"input_ids": list(range(length)), "labels": [IGNORED] * (length // 3) + list(range(length - length // 3))}
        rows.append(row | ({"document_lengths": [length // 2, length - length // 2]} if packed else {}))
    return Dataset.from_list(rows)


def write_base(folder: Path, architecture: str = "llama", **shape: Any) -> Base:
    """A random model on disk."""
    config = AutoConfig.for_model(architecture, **{**(GPT2 if architecture == "gpt2" else SHAPE), **shape})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return Base(str(folder))


def reachable() -> dict[int, int]:
    """Bytes of every storage that Python can reach, by address."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not isinstance(one, FakeTensor)]
    storages = [one.untyped_storage() for one in tensors if one.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measured(recipe: Recipe, base: Base, rows: Dataset) -> int:
    """Most bytes of tensors in the second step of a real training, by the allocator's account."""
    gc.collect()
    others = reachable()
    model = adapting.attach_adapter(loading.load_model(base, recipe.model), recipe.adapter, base).train()
    under = model.get_base_model()
    assert isinstance(under, PreTrainedModel)
    if recipe.training.gradient_checkpointing:
        under.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    batch = heavy_rows(rows).batch(recipe, keeps_logits(under))
    trained = [one for one in model.parameters() if one.requires_grad]
    make_optimizer: Any = AdamW8bit if recipe.training.optimizer == "adamw_8bit" else torch.optim.AdamW
    optimizer = make_optimizer(trained)
    head = separable_head(under)

    def step() -> None:
        for _ in range(recipe.training.gradient_accumulation):
            training_loss(model, batch, None, head).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    before = sum(size for address, size in reachable().items() if address not in others)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return before + peak


def foretold(recipe: Recipe, base: Base, rows: Dataset, whole: bool = False) -> dict[str, int]:
    """The forecast, by use, without the libraries."""
    config = AutoConfig.from_pretrained(base.location)
    skeleton = adapting.check_adapter(config, recipe.model, recipe.adapter, base)
    found = forecast(recipe, skeleton, heavy_rows(rows), whole=whole)
    assert not found.gap
    return {use: size for use, size in found.uses.items() if use != RUNTIME}


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"model__dtype": "bfloat16"}),
    ("llama", {}, {"model__attention": "eager"}),
    ("llama", {}, {"training__gradient_checkpointing": True}),
    ("llama", {}, {"training__gradient_accumulation": 2, "adapter__r1": 30, "training__optimizer": "adamw_8bit"}),
    ("llama", {}, {"model__quantization": "nf4", "adapter__dtype": "bfloat16", "adapter__targets": ["q_proj", "v_proj"]}),
    ("llama", {}, {"model__quantization": "int8", "model__dtype": "bfloat16"}),
    ("llama", {"tie_word_embeddings": False}, {"adapter__modules_to_save": ["lm_head"], "adapter__layers": [2]}),
    ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 32}, {"model__dtype": "bfloat16"}),
    ("gpt2", {}, {"adapter__targets": ["c_attn", "c_proj", "c_fc"], "model__quantization": "nf4"}),
]


@pytest.mark.parametrize(("architecture", "shape", "settings"), CASES)
def test_forecast_is_what_a_step_takes(
    tmp_path: Path, architecture: str, shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    base, recipe, rows = write_base(tmp_path, architecture, **shape), make_recipe(**settings), make_rows(150, 101, 60)
    # Wrong by a tensor of a block, it would be wrong by more.
    assert sum(foretold(recipe, base, rows).values()) == pytest.approx(measured(recipe, base, rows), rel=0.05)


def test_forecast_of_packed_rows(tmp_path: Path) -> None:
    base, recipe = write_base(tmp_path), make_recipe(rows=2, data__packing=True, data__max_length_tokens=128)
    rows = make_rows(128, 128, packed=True)
    assert sum(foretold(recipe, base, rows).values()) == pytest.approx(measured(recipe, base, rows), rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"training__gradient_checkpointing": True}, {"adapter__layers": [2, 3]}])
def test_one_block_of_each_kind_says_what_all_say(tmp_path: Path, settings: dict[str, Any]) -> None:
    base, recipe, rows = write_base(tmp_path, num_hidden_layers=7), make_recipe(**settings), make_rows(120, 70, 33)
    assert foretold(recipe, base, rows) == foretold(recipe, base, rows, whole=True)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bytes_are_those_of_a_quantised_model(tmp_path: Path, kind: str) -> None:
    # 96 x 200: the last block of scales is not full.
    base, recipe = write_base(tmp_path, tie_word_embeddings=False), make_recipe(model__quantization=kind)
    model = loading.load_model(base, recipe.model)
    tensors = [*model.parameters(), *model.buffers(), *scales(model)]
    real = sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
    found = foretold(recipe, base, make_rows(40, 40, 40))["base weights"]
    # bitsandbytes keeps one table of 256 scales for all layers.
    tables = 1024 * (4 * 7 - 1) if kind == "nf4" else 0
    assert found - real in (0, tables)


def scales(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps beside a quantised weight."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        if getattr(weight, "SCB", None) is not None:
            yield weight.SCB  # type: ignore[union-attr]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_optimizer_state_is_the_optimizers(tmp_path: Path, optimizer: str) -> None:
    base, recipe = write_base(tmp_path), make_recipe(training__optimizer=optimizer, adapter__r1=30)
    model = adapting.attach_adapter(loading.load_model(base, recipe.model), recipe.adapter, base)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert {one.numel() < 4096 for one in trained} == {True, False}  # bitsandbytes treats them differently
    make_optimizer: Any = AdamW8bit if optimizer == "adamw_8bit" else torch.optim.AdamW
    made = make_optimizer(trained)
    for one in trained:
        one.grad = torch.zeros_like(one)
    made.step()
    tensors = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    real = sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
    assert foretold(recipe, base, make_rows(40, 40, 40))[OPTIMIZER] == real


def test_heaviest_batch_has_the_longest_row_and_those_most_is_learned_from() -> None:
    lengths_and_given = [(50, 49), (20, 2), (64, 60), (30, 10), (40, 39)]
    rows = Dataset.from_list(
        [{"input_ids": [1] * length, "labels": [IGNORED] * given + [1] * (length - given)} for length, given in lengths_and_given]
    )
    heavy = heavy_rows(rows)
    assert heavy.order[:3] == (2, 3, 1)
    batch = heavy.batch(make_recipe(rows=3), keeps_logits=True)
    assert batch["input_ids"].shape == (3, 64)
    assert len(batch["targets"]) == 4 + 20 + 18
    assert heavy.batch(make_recipe(rows=7), keeps_logits=True)["input_ids"].shape == (7, 64)
    assert heavy.batch(make_recipe(rows=2, data__max_length_tokens=16), keeps_logits=True)["input_ids"].shape == (2, 16)
