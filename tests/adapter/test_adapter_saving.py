"""Saving and loading: what is on disk, bit for bit, and that no SVD runs on the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, ModelMaker
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_adapter_model import abba_layers, config, logits, train, trained

from abba_cli.adapter import AbbaConfig, factors, starts


@pytest.fixture
def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an SVD was run")

    for module, name in ((starts, "svd_init"), (factors, "truncated_svd"), (torch.linalg, "svd")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_is_exact(
    tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model = trained(tiny(architecture, dtype), ids, dropout=0.1)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(architecture, dtype), tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    saved = {name: p for name, p in model.state_dict().items() if "abba_" in name}
    assert all(torch.equal(loaded.state_dict()[name], p) for name, p in saved.items())


def test_the_files_can_be_read_without_this_package(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    patterns = {"rank_pattern": {"q_proj": [2, 6]}, "alpha_pattern": {"q_proj": 5.0}}
    model = trained(base, ids, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **patterns)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r1"], settings["r2"], settings["alpha"]) == ("ABBA", 3, 5, 4.0)
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    plain = tiny()
    modules = {key.rpartition(".abba_")[0] for key in saved}
    assert len(modules) == 4
    for module in modules:
        A1, B1, A2, B2 = (saved.pop(f"{module}.abba_{letter}") for letter in ("A1", "B1", "A2", "B2"))
        r1, r2, alpha = (2, 6, 5.0) if module.endswith("q_proj") else (3, 5, 4.0)
        assert (A1.shape[0], A2.shape[0]) == (r1, r2)
        delta = alpha**2 / (r1 * r2) ** 0.5 * ((B1 @ A1) * (B2 @ A2))
        plain.get_submodule(module.removeprefix("base_model.model.")).weight.data += delta
    assert not saved
    torch.testing.assert_close(logits(plain, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_runs_no_svd(
    tiny: ModelMaker,
    ids: torch.Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    is_trainable: bool,
    low_cpu_mem_usage: bool,
) -> None:
    model = trained(tiny(), ids)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    request.getfixturevalue("no_svd")
    loading = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}

    first = PeftModel.from_pretrained(tiny(), tmp_path, **loading)
    assert torch.equal(logits(first, ids), expected)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    first.load_adapter(tmp_path, "second", **loading)
    first.set_adapter("second", inference_mode=not is_trainable)
    assert torch.equal(logits(first, ids), expected)
    given = PeftModel.from_pretrained(tiny(), tmp_path, config=PeftConfig.from_pretrained(tmp_path), **loading)
    assert torch.equal(logits(given, ids), expected)
    own = tiny()
    own.load_adapter(str(tmp_path), is_trainable=is_trainable)  # transformers' integration
    assert torch.equal(logits(own, ids), expected)
    for loaded in (first, given, own):
        assert not any(layer.pending_svd for layer in abba_layers(loaded).values())
        names = [name for name, p in loaded.named_parameters() if p.requires_grad]
        assert bool(names) == is_trainable
        assert all(".abba_" in name for name in names)


def test_training_goes_on_from_a_loaded_adapter(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    model = trained(tiny(), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert train(loaded, ids) == train(model, ids)


def test_auto_peft_model(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = trained(base, ids, task_type="CAUSAL_LM")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    request.getfixturevalue("no_svd")
    for trainable in (False, True):
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=trainable)
        assert torch.equal(logits(loaded, ids), expected)
        assert isinstance(loaded.peft_config["default"], AbbaConfig)


@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, AbbaConfig.from_pretrained])
def test_a_config_read_from_a_file_can_start_a_fresh_adapter(
    tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path, read: Any
) -> None:
    """Its SVD is put off to the first forward, since PEFT does not tell a fresh start from a load."""
    config().save_pretrained(tmp_path)
    model = get_peft_model(tiny(), read(tmp_path))
    assert torch.equal(logits(model, ids), logits(tiny(), ids))
    reference = get_peft_model(tiny(), config())
    for late, early in zip(abba_layers(model).values(), abba_layers(reference).values(), strict=True):
        assert not late.pending_svd
        assert late.abba_B1["default"].any()
        assert torch.equal(late.abba_B1["default"], early.abba_B1["default"])
        assert torch.equal(late.abba_A1["default"], early.abba_A1["default"])


def test_weights_copied_in_by_hand_are_not_overwritten(
    tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = trained(tiny(), ids)
    expected = logits(model, ids)
    model.peft_config["default"].save_pretrained(tmp_path)
    request.getfixturevalue("no_svd")
    copied = get_peft_model(tiny(), PeftConfig.from_pretrained(tmp_path))
    for target, source in zip(copied.parameters(), model.parameters(), strict=True):
        target.data.copy_(source)
    assert torch.equal(logits(copied, ids), expected)


def test_a_fresh_model_on_meta_waits_for_its_values(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    model = trained(tiny(), ids)
    fresh = get_peft_model(tiny(), config(), low_cpu_mem_usage=True)
    assert all(layer.abba_B1["default"].is_meta for layer in abba_layers(fresh).values())
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_saved_biases_and_modules(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    for number, bias in enumerate(("abba_only", "all")):
        model = trained(tiny("gpt2"), ids, bias=bias, target_modules=["c_attn"], modules_to_save=["ln_f"])
        model.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / str(number))
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_several_adapters_are_saved_apart(tiny: ModelMaker, ids: torch.Tensor, tmp_path: Path) -> None:
    model = trained(tiny(), ids)
    model.add_adapter("second", config(r1=2, init_weights=False, target_modules=["o_proj"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "other")
    for ours, theirs in (("default", "default"), ("second", "other")):
        model.set_adapter(ours)
        loaded.set_adapter(theirs)
        assert torch.equal(logits(model, ids), logits(loaded, ids))
