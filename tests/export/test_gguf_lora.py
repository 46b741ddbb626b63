"""The llama.cpp LoRA adapter, judged by llama.cpp: base and adapter answer there as they do in transformers."""

import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from llamacpp import VOCABULARY, LlamaCpp, next_token_error, save_adapter, tiny_config
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config

from abba_cli.errors import ModelError
from abba_cli.export.converter import find_converter
from abba_cli.export.gguf import convert
from abba_cli.export.gguf_lora import check_gguf_lora, write_gguf_lora
from abba_cli.recorded_base import fit
from abba_cli.saved_adapter import SavedAdapter, open_adapter

PROMPTS = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
FAST = ("llama", "qwen3", "phi3")
SLOW = ("mistral", "smollm3", "qwen2", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("architecture", [*FAST, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
def test_llama_cpp_answers_like_base_and_adapter(
    architecture: str, shaped: Callable[..., Path], converter_folder: Path, tmp_path: Path
) -> None:
    base = shaped(architecture)
    saved = save_adapter(base, tmp_path / "adapter", rank_pattern={"o_proj": [2, 5]})
    adapter, config = open_adapter(saved), AutoConfig.from_pretrained(base)
    convert(base, tmp_path / "base.gguf", "f32", find_converter(converter_folder))
    assert write_gguf_lora(adapter, tmp_path / "lora.gguf", config, fit(adapter, config)) == 12
    tuned = AutoPeftModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    # llama.cpp's GELU, which Gemma has, looks its values up in a table of float16.
    tolerance = 5e-3 if architecture.startswith("gemma") else 1e-4
    assert next_token_error(LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf"), tuned, PROMPTS) < tolerance
    assert next_token_error(LlamaCpp(tmp_path / "base.gguf"), tuned, PROMPTS) > 20 * tolerance, "the adapter does too little"


@pytest.fixture(scope="module")
def llama(shaped: Callable[..., Path]) -> Path:
    return shaped("llama")


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SavedAdapter:
    return open_adapter(save_adapter(llama, tmp_path_factory.mktemp("adapter")))


def test_the_keys_are_those_of_llama_cpps_own_converter(llama: Path, saved: SavedAdapter, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    seen: list[tuple[int, int]] = []
    write_gguf_lora(saved, tmp_path / "lora.gguf", config, fit(saved, config), progress=lambda *done: seen.append(done))
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    keys = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 12.0}
    assert {key: reader.fields[key].contents() for key in keys} == keys
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    assert len(shapes) == 2 * 2 * 7
    # GGUF names the fastest dimension first.
    assert shapes["blk.1.ffn_down.weight.lora_a"] == [72, 12]
    assert shapes["blk.1.attn_k.weight.lora_b"] == [12, 16]
    assert seen == [(done, 14) for done in range(15)]
    assert [path.name for path in tmp_path.iterdir()] == ["lora.gguf"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2)])
def test_narrower_types(
    dtype: str, tolerance: float, llama: Path, saved: SavedAdapter, converter_folder: Path, tmp_path: Path
) -> None:
    config, files = AutoConfig.from_pretrained(llama), {}
    for one in ("float32", dtype):
        files[one] = tmp_path / f"{one}.gguf"
        write_gguf_lora(saved, files[one], config, fit(saved, config), dtype=one)  # type: ignore[arg-type]
    wide, narrow = (gguf.GGUFReader(file).tensors for file in files.values())
    for a, b in zip(wide, narrow, strict=True):
        assert b.n_bytes * 2 == a.n_bytes
        values = torch.from_numpy(gguf.quants.dequantize(b.data, b.tensor_type).copy())
        assert torch.equal(values, torch.from_numpy(a.data.copy()).to(getattr(torch, dtype)).float())
    convert(llama, tmp_path / "base.gguf", "f32", find_converter(converter_folder))
    tuned = AutoPeftModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32)
    assert next_token_error(LlamaCpp(tmp_path / "base.gguf", files[dtype]), tuned, PROMPTS) < tolerance


def test_values_past_float16_are_named_and_leave_no_file(llama: Path, saved: SavedAdapter, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    tensors = load_file(saved.path / "adapter_model.safetensors")
    save_file({key: value * 1000 for key, value in tensors.items()}, tmp_path / "large" / "adapter_model.safetensors")
    (tmp_path / "large" / "adapter_config.json").write_bytes((saved.path / "adapter_config.json").read_bytes())
    adapter, config = open_adapter(tmp_path / "large"), AutoConfig.from_pretrained(llama)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"model\.layers\.0\.\S+: its LoRA factors reach .*, too large for float16; use float32"):
        write_gguf_lora(adapter, tmp_path / "out" / "lora.gguf", config, fit(adapter, config), dtype="float16")
    assert not list((tmp_path / "out").iterdir())


def test_a_smaller_rank(llama: Path, saved: SavedAdapter, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    assert write_gguf_lora(saved, tmp_path / "lora.gguf", config, fit(saved, config), rank=5) == 5
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 5.0
    assert {int(tensor.shape[1]) for tensor in reader.tensors if tensor.name.endswith("lora_a")} == {5}


def test_an_unknown_architecture_is_named(saved: SavedAdapter) -> None:
    with pytest.raises(ModelError, match=r"its base is of type gpt2, .* \(known: gemma, .*\); use `--format gguf`"):
        check_gguf_lora(saved, GPT2Config(), dict.fromkeys(saved.layers, "linear"))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_parameters_trained_whole_are_refused(llama: Path, tmp_path: Path, settings: dict[str, list[str]]) -> None:
    adapter = open_adapter(save_adapter(llama, tmp_path, target_modules=["q_proj"], **settings))
    config = AutoConfig.from_pretrained(llama)
    with pytest.raises(ModelError, match=rf"{settings['modules_to_save'][0]}\.weight was trained whole .*; use `--format gguf`"):
        write_gguf_lora(adapter, tmp_path / "lora.gguf", config, fit(adapter, config))


def test_layers_that_are_not_linear_are_refused(llama: Path, saved: SavedAdapter) -> None:
    kinds = dict.fromkeys(saved.layers, "linear") | {"model.layers.1.mlp.up_proj": "transposed"}
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj is a transposed layer"):
        check_gguf_lora(saved, AutoConfig.from_pretrained(llama), kinds)  # type: ignore[arg-type]


def test_an_output_layer_is_adapted_only_where_it_has_weights_of_its_own(llama: Path, tmp_path: Path) -> None:
    adapter = open_adapter(save_adapter(llama, tmp_path, target_modules=["lm_head"]))
    _, names = check_gguf_lora(adapter, tiny_config("llama"), {"lm_head": "linear"})
    assert names == {"lm_head": "output.weight"}
    with pytest.raises(ModelError, match="no weight of its own for lm_head in llama"):
        check_gguf_lora(adapter, tiny_config("llama", tie_word_embeddings=True), {"lm_head": "linear"})


def test_without_the_gguf_package(llama: Path, saved: SavedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    config = AutoConfig.from_pretrained(llama)
    with pytest.raises(ModelError, match=r"pip install 'abba-cli\[gguf\]'"):
        write_gguf_lora(saved, tmp_path / "lora.gguf", config, fit(saved, config))
