"""`abba merge` writes what base + adapter computes, as a checkpoint that stock transformers loads."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import OUTCOME, PROMPT, adapted_logits, logits, relative, write_adapter, write_model
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from abba_cli.merging import merge

ARCHITECTURES = ["llama", "mistral", "gemma2", "qwen2", "qwen3", "gpt2"]
# Two roundings of a 32-wide model's weights, as shares of the logits' spread.
ROUNDING = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(architecture: str = "llama", dtype: str = "float32", **settings: Any) -> Path:
        return write_model(tmp_path / "base", tiny_llama, architecture, dtype, **settings)

    return make


def dense_update(adapter: Path, layer: str) -> torch.Tensor:
    """s (B1 A1) * (B2 A2) in float64, from the file alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        B1, A1, B2, A2 = (file.get_tensor(f"base_model.model.{layer}.abba_{one}").double() for one in ("B1", "A1", "B2", "A2"))
    s = config["alpha"] ** 2 / (A1.shape[0] * A2.shape[0]) ** 0.5
    return s * (B1 @ A1) * (B2 @ A2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_model_answers_like_base_and_adapter(
    architecture: str, dtype: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base(architecture, dtype)
    adapter = write_adapter(tmp_path / "adapter", folder)
    merged = merge([adapter], output=tmp_path / "merged")
    assert merged.layers == (8 if architecture == "gpt2" else 14)
    assert merged.verification is not None
    found = AutoModelForCausalLM.from_pretrained(merged.path)
    assert found.dtype == getattr(torch, dtype)
    expected = adapted_logits(folder, adapter)
    untouched = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder)
    assert relative(untouched, expected) > 5 * ROUNDING[dtype]
    assert relative(logits(found.float(), folder), expected) < ROUNDING[dtype]


def test_stock_transformers_loads_it_without_this_package(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    adapter = write_adapter(tmp_path / "adapter", folder)
    merge([adapter], output=tmp_path / "merged")
    program = f"""
import sys
sys.modules["abba_cli"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r})
tokens = AutoTokenizer.from_pretrained({str(tmp_path / "merged")!r})({PROMPT!r}, return_tensors="pt").input_ids
torch.save(model(tokens).logits[0].detach(), {str(tmp_path / "logits.pt")!r})
print(model.generation_config.max_new_tokens)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "17"  # the base's generation config came along
    assert relative(torch.load(tmp_path / "logits.pt"), adapted_logits(folder, adapter)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_float32_and_rounded_once(dtype: torch.dtype, base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(dtype=str(dtype).removeprefix("torch."))
    adapter = write_adapter(tmp_path / "adapter", folder)
    merge([adapter], output=tmp_path / "merged", verify=False)
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "merged"))
    name = "model.layers.1.mlp.down_proj"
    exact = before[f"{name}.weight"].double() + dense_update(adapter, name)
    rounded_twice = before[f"{name}.weight"] + dense_update(adapter, name).to(dtype)
    found = after[f"{name}.weight"]
    assert (found == exact.to(dtype)).float().mean() > 0.999  # float32's own rounding decides a tie now and then
    assert (rounded_twice == exact.to(dtype)).float().mean() < 0.99


def test_what_is_not_adapted_is_copied_byte_for_byte_into_the_same_files(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(dtype="bfloat16", max_shard_size="1MB")
    adapter = write_adapter(tmp_path / "adapter", folder, target_modules=["q_proj"])
    merge([adapter], output=tmp_path / "merged")
    index = "model.safetensors.index.json"
    before, after = (json.loads((one / index).read_text()) for one in (folder, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert len(set(after["weight_map"].values())) > 1
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    for name in sorted(set(after["weight_map"].values())):
        old, new = load_file(folder / name), load_file(tmp_path / "merged" / name)
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            same = torch.equal(new[key].view(torch.uint8), tensor.view(torch.uint8))
            assert same != ("q_proj" in key), key
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_shard_size_cuts_new_files(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    adapter = write_adapter(tmp_path / "adapter", folder)
    merge([adapter], output=tmp_path / "merged", shard_bytes=50_000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 2
    largest = [max(value.nbytes for value in load_file(file).values()) for file in files]
    assert all(file.stat().st_size < max(50_000, size) + 4_000 for file, size in zip(files, largest, strict=True))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(found, folder), adapted_logits(folder, adapter)) < 1e-5


def test_another_dtype_is_for_all_tensors(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(dtype="bfloat16")
    adapter = write_adapter(tmp_path / "adapter", folder)
    merge([adapter], output=tmp_path / "merged", dtype="float32")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.dtype == torch.float32
    assert relative(logits(found, folder), adapted_logits(folder, adapter)) < 1e-5


def test_several_adapters_are_summed_by_their_weights(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    first = write_adapter(tmp_path / "a", folder, seed=1)
    second = write_adapter(tmp_path / "b", folder, seed=2, r1=2, r2=5, target_modules=["q_proj", "down_proj"])
    merged = merge([first, second], weights=[0.7, -0.3], output=tmp_path / "merged")
    assert merged.verification is not None
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "merged"))
    for layer, weights in (("self_attn.q_proj", (0.7, -0.3)), ("mlp.up_proj", (0.7,))):
        name = f"model.layers.0.{layer}"
        exact = before[f"{name}.weight"].double()
        for adapter, weight in zip((first, second), weights, strict=False):
            exact = exact + weight * dense_update(adapter, name)
        torch.testing.assert_close(after[f"{name}.weight"].double(), exact, rtol=1e-6, atol=1e-7)
    expected = adapted_logits(folder, first, second, weights=(0.7, -0.3))
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged.path), folder), expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_modules_trained_whole_come_along_also_untied(module: str, tied: bool, base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(tie_word_embeddings=tied)
    adapter = write_adapter(tmp_path / "adapter", folder, modules_to_save=[module])
    merged = merge([adapter], output=tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(merged.path)
    assert not found.config.tie_word_embeddings
    assert relative(logits(found, folder), adapted_logits(folder, adapter)) < 1e-5
    without = write_adapter(tmp_path / "without", folder)
    assert relative(adapted_logits(folder, without), adapted_logits(folder, adapter)) > 1e-2


def test_a_module_trained_whole_is_weighted_like_an_update(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(tie_word_embeddings=False)
    adapter = write_adapter(tmp_path / "adapter", folder, modules_to_save=["lm_head"])
    merged = merge([adapter], weights=[0.25], output=tmp_path / "merged")
    assert "trained whole" in merged.unverified
    before, after = (load_file(one / "model.safetensors") for one in (folder, merged.path))
    trained = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    expected = 0.75 * before["lm_head.weight"] + 0.25 * trained
    torch.testing.assert_close(after["lm_head.weight"], expected)


@pytest.mark.parametrize("bias", ["all", "abba_only"])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_trained_biases_come_along(architecture: str, bias: str, base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(architecture)
    adapter = write_adapter(tmp_path / "adapter", folder, bias=bias)
    merged = merge([adapter], output=tmp_path / "merged")
    before, after = (load_file(one / "model.safetensors") for one in (folder, merged.path))
    changed = {name for name in before if name.endswith(".bias") and not torch.equal(before[name], after[name])}
    biases = {name for name in before if name.endswith(".bias")}
    assert changed == (biases if bias == "all" else {name for name in biases if "ln" not in name})
    found = AutoModelForCausalLM.from_pretrained(merged.path)
    assert relative(logits(found, folder), adapted_logits(folder, adapter)) < 1e-5


def test_patterns_and_chosen_layers(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    adapter = write_adapter(
        tmp_path / "adapter",
        folder,
        rank_pattern={"q_proj": [5, 1], "model.layers.1.mlp.up_proj": 4},
        alpha_pattern={"down_proj": 0.5},
        layers_to_transform=[1],
    )
    merged = merge([adapter], output=tmp_path / "merged")
    assert merged.layers == 7
    found = AutoModelForCausalLM.from_pretrained(merged.path)
    assert relative(logits(found, folder), adapted_logits(folder, adapter)) < 1e-5


def test_a_checkpoint_without_the_base_models_prefix(base: Callable[..., Path], tmp_path: Path) -> None:
    """The hub's GPT-2 stores `h.0...`, the model calls it `transformer.h.0...`."""
    from safetensors.torch import save_file

    folder = base("gpt2")
    adapter = write_adapter(tmp_path / "adapter", folder)
    expected = adapted_logits(folder, adapter)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor.clone() for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    merged = merge([adapter], output=tmp_path / "merged")
    assert load_file(merged.path / "model.safetensors").keys() == renamed.keys()
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged.path), folder), expected) < 1e-5


@pytest.mark.parametrize(("quantization", "architecture"), [("nf4", "llama"), ("nf4", "gpt2"), ("int8", "llama")])
def test_the_dequantised_base_is_the_one_that_training_saw(
    quantization: str, architecture: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base(architecture, "bfloat16")
    adapter = write_adapter(tmp_path / "adapter", folder)
    record = {"abba": "0", "base": {"name": str(folder), "quantization": quantization, "dtype": "bfloat16"}, "outcome": OUTCOME}
    (adapter / "provenance.json").write_text(json.dumps(record))
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings))
    trained = PeftModel.from_pretrained(seen, adapter)
    merged = merge([adapter], output=tmp_path / "merged", base_precision="dequantized", dtype="float32", verify=False)
    after = load_file(merged.path / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    layers = {name: module for name, module in trained.get_base_model().named_modules() if hasattr(module, "abba_A1")}
    for name, module in layers.items():
        weight = module.get_base_weight().detach().double()
        stored = original[f"{name}.weight"].double()
        update = dense_update(adapter, name)
        if architecture == "gpt2":
            weight, update = weight.T, update.T
        exact = weight + update
        assert (weight - stored).abs().max() > 1e-3  # the round trip is no small thing
        tolerance = 2e-3 if quantization == "int8" else 1e-6  # int8's scales are rounded to the type of the weight
        torch.testing.assert_close(after[f"{name}.weight"].double(), exact, rtol=0, atol=tolerance)
    plain = merge([adapter], output=tmp_path / "plain", dtype="float32", verify=False)
    name = next(iter(layers))
    kept = load_file(plain.path / "model.safetensors")[f"{name}.weight"].double()
    update = dense_update(adapter, name)
    torch.testing.assert_close(
        kept, original[f"{name}.weight"].double() + (update.T if architecture == "gpt2" else update), rtol=0, atol=1e-6
    )


def test_a_quantised_merge_is_verified_against_the_quantised_base(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(dtype="bfloat16")
    adapter = write_adapter(tmp_path / "adapter", folder)
    record = {"abba": "0", "base": {"name": str(folder), "quantization": "nf4", "dtype": "bfloat16"}, "outcome": OUTCOME}
    (adapter / "provenance.json").write_text(json.dumps(record))
    merged = merge([adapter], output=tmp_path / "merged", base_precision="dequantized")
    assert merged.verification is not None


def test_rows_are_merged_in_blocks(base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base("gpt2")
    adapter = write_adapter(tmp_path / "adapter", folder)
    whole = merge([adapter], output=tmp_path / "whole", verify=False)
    monkeypatch.setattr("abba_cli.merge.tensors._BLOCK_BYTES", 4 * 7 * 96)  # seven rows of the widest weight
    blocks = merge([adapter], output=tmp_path / "blocks", verify=False)
    first, second = (load_file(one.path / "model.safetensors") for one in (whole, blocks))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-7)


def test_peak_memory_is_bounded_by_a_block_not_by_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    """The same at 4.4 GB: benchmarks/merge_memory.py."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "initializer_range": 0.02}
    folder = write_model(tmp_path / "base", tiny_llama, dtype="bfloat16", max_shard_size="50MB", **sizes)
    adapter = write_adapter(tmp_path / "adapter", folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size > 300_000_000

    def peak(program: str) -> int:
        code = f"{program}\nfrom abba_cli.memory import peak_process_memory\nprint('PEAK', peak_process_memory())"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.rpartition("PEAK ")[2])

    idle = peak("import abba_cli.merging, bitsandbytes")
    call = f"merge([{str(adapter)!r}], output=Path({str(tmp_path / 'merged')!r}), verify=False)"
    busy = peak(f"from pathlib import Path\nfrom abba_cli.merging import merge\n{call}")
    # Four blocks of 32 MB and what one layer's factors take; the rest is the allocator's.
    assert busy - idle < 250_000_000
    shutil.rmtree(tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_all_biases_and_a_module_trained_whole_together(base: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT writes the biases of such a module three times."""
    folder = base("gpt2")
    adapter = write_adapter(tmp_path / "adapter", folder, bias="all", modules_to_save=["ln_f"])
    merged = merge([adapter], output=tmp_path / "merged")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged.path), folder), adapted_logits(folder, adapter)) < 1e-5
