"""AbbaConfig and the registration with PEFT."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from peft import LoraConfig, PeftConfig, PeftMixedModel, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import mixed
from peft.tuners.mixed import model as mixed_model
from peft.utils import PeftType, register_peft_method
from test_adapter_model import abba_layers, config, logits

import abba_cli.adapter
from abba_cli.adapter import AbbaConfig, AbbaModel
from abba_cli.adapter.peft_types import add_peft_type


def test_defaults_are_the_papers() -> None:
    settings = AbbaConfig()
    assert (settings.r1, settings.r2, settings.alpha, settings.dropout) == (16, 16, 16.0, 0.0)
    assert (settings.bias, settings.init_weights, settings.target_modules) == ("none", True, None)


def test_every_field_is_described() -> None:
    own = set(AbbaConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert len(own) == 15
    assert all(AbbaConfig.__dataclass_fields__[name].metadata["help"].endswith(".") for name in own)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    settings = AbbaConfig(
        r1=3,
        r2=7,
        alpha=9.5,
        dropout=0.1,
        target_modules=["a", "b"],
        rank_pattern={"a": 4, "b": [1, 2]},
        alpha_pattern={"a": 2.5},
        init_weights="random",
        task_type="CAUSAL_LM",
    )
    settings.save_pretrained(tmp_path)
    for read in (AbbaConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(read) is AbbaConfig
        assert read.to_dict() == settings.to_dict()
        assert read.read_from_file
    assert not settings.read_from_file
    assert "read_from_file" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert get_peft_config(settings.to_dict()).to_dict() == settings.to_dict()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r1": 0}, "`r1` should be a positive integer value but the value passed is 0"),
        ({"r2": -3}, "`r2` should be a positive integer value but the value passed is -3"),
        ({"r1": 2.0}, "`r1` should be a positive integer value but the value passed is 2.0"),
        ({"alpha": 0}, "`alpha` should be a positive number but the value passed is 0"),
        ({"alpha": "16"}, "`alpha` should be a positive number but the value passed is '16'"),
        ({"dropout": 1.0}, "`dropout` is 1.0, but it has to be at least 0 and less than 1"),
        ({"init_weights": "gaussian"}, r"`init_weights` is 'gaussian', not one of \(True, False, 'svd', 'random', 'swapped'"),
        ({"init_weights": 1}, "`init_weights` is 1, not one of"),
        ({"bias": "lora_only"}, "`bias` is 'lora_only', but it has to be one of"),
        ({"rank_pattern": {"a": [1, 2, 3]}}, r"`rank_pattern\['a'\]` is \[1, 2, 3\], but it has to be N or \[r1, r2\]"),
        ({"rank_pattern": {"a": [1, 0]}}, r"`rank_pattern\['a'\]` should be a positive integer value"),
        ({"alpha_pattern": {"a": -1.0}}, r"`alpha_pattern\['a'\]` should be a positive number"),
        ({"layers_pattern": "h"}, "When `layers_pattern` is specified, `layers_to_transform` must also"),
    ],
)
def test_wrong_values_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AbbaConfig(**kwargs)


def test_ranks_for() -> None:
    settings = AbbaConfig(r1=3, r2=5, rank_pattern={"a": 4, "b": [1, 2]})
    assert settings.ranks_for("a") == (4, 4)
    assert settings.ranks_for("b") == (1, 2)
    assert settings.ranks_for("c") == (3, 5)


def test_registration() -> None:
    assert PeftType("ABBA") is PeftType.__members__["ABBA"]
    assert PeftType("ABBA") == "ABBA"
    assert "ABBA" in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("ABBA")] is AbbaConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ABBA"] is AbbaConfig  # PEFT looks it up by the string in the file
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("ABBA")] is AbbaModel
    assert pickle.loads(pickle.dumps(PeftType("ABBA"))) is PeftType("ABBA")
    assert copy.deepcopy(AbbaConfig(r1=2)) == AbbaConfig(r1=2)
    with pytest.raises(KeyError, match="already PEFT method called 'abba'"):
        register_peft_method(name="abba", config_cls=AbbaConfig, model_cls=AbbaModel)


def test_registering_twice_changes_nothing() -> None:
    before = (list(PeftType), mixed.COMPATIBLE_TUNER_TYPES, list(mixed_model.PREFIXES), mixed_model.Layers)
    create = mixed.MixedModel._create_and_replace
    add_peft_type("ABBA")
    abba_cli.adapter._register()
    importlib.reload(abba_cli.adapter)
    assert before == (list(PeftType), mixed.COMPATIBLE_TUNER_TYPES, list(mixed_model.PREFIXES), mixed_model.Layers)
    assert mixed.MixedModel._create_and_replace is create
    assert mixed.COMPATIBLE_TUNER_TYPES is mixed_model.COMPATIBLE_TUNER_TYPES


def test_imports_without_bitsandbytes() -> None:
    code = "import sys; sys.modules['bitsandbytes'] = None; import abba_cli.adapter as a; print(a.AbbaConfig().r1)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "16"


def test_mixes_with_lora(tiny: ModelMaker, ids: torch.Tensor) -> None:
    base = logits(tiny(), ids)
    model = get_peft_model(tiny(), config(target_modules=["q_proj", "v_proj"]), mixed=True)
    assert isinstance(model, PeftMixedModel)
    assert torch.equal(logits(model, ids), base)
    layer = next(iter(abba_layers(model).values()))
    assert layer.abba_B1["default"].any()  # the SVD has run, at the latest in the forward
    for module in abba_layers(model).values():
        module.abba_B2["default"].data.normal_(std=0.1)
    abba_only = logits(model, ids)
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False))
    assert torch.equal(logits(model, ids), abba_only)
    model.set_adapter("lora")
    lora_only = logits(model, ids)
    model.set_adapter(["default", "lora"])
    both = logits(model, ids)
    for other in (base, abba_only, lora_only):
        assert not torch.allclose(both, other, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), both, atol=1e-4, rtol=1e-4)


def test_peft_converts_it_to_lora(tiny: ModelMaker, ids: torch.Tensor) -> None:
    """PEFT's generic conversion, by SVD of dW, accepts ABBA layers: rank 3 * 5 is enough."""
    from peft import convert_to_lora

    model = get_peft_model(tiny(), config(init_weights=False, target_modules=["up_proj"]))
    assert model.supports_lora_conversion()
    lora_config, state_dict = convert_to_lora(model, rank=15)
    assert lora_config.r == 15
    weights = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    for name, layer in abba_layers(model.base_model.model).items():
        product = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        scale = lora_config.lora_alpha / lora_config.r
        torch.testing.assert_close(scale * product, layer.get_delta_weight("default"), atol=1e-4, rtol=0)
