"""ABBA as LoHa: stock PEFT computes the same, with ABBA's own factors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import Made, changed, difference, make_adapter, make_base, stock_logits

from abba_cli.errors import ModelError
from abba_cli.export.loha import write_loha

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-equal-ranks": ("llama", {"r1": 4, "r2": 4, "target_modules": ["q_proj", "down_proj"]}),
    "mistral-patterns": (
        "mistral",
        {
            "target_modules": r".*\.(q_proj|o_proj|up_proj|down_proj)",
            "rank_pattern": {"q_proj": [2, 6], "model.layers.1.mlp.down_proj": 4},
            "alpha_pattern": {"up_proj": 5.0, "layers.0.self_attn.q_proj": 3.0},
        },
    ),
    "gemma2-one-layer": (
        "gemma2",
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "r1": 6, "r2": 2},
    ),
    "qwen2-head": ("qwen2", {"modules_to_save": ["lm_head"], "exclude_modules": ["v_proj"]}),
    # These biases go with their modules, which LoHa carries, too.
    "qwen2-biases-of-a-saved-module": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["k_proj"]}),
    "llama-no-biases": ("llama", {"bias": "all", "target_modules": ["v_proj", "o_proj"]}),
}
Exported = dict[str, tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("made")
    bases = {name: make_base(name, folder / "bases" / name) for name in {architecture for architecture, _ in CASES.values()}}
    return {case: make_adapter(bases[name], folder / case, **settings) for case, (name, settings) in CASES.items()}


@pytest.fixture(scope="module")
def exported(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    for case, one in made.items():
        (folder / case).mkdir()
        write_loha(one.saved, folder / case, one.kinds)
    logits = stock_logits([(one, folder / case) for case, one in made.items()], folder / "logits.pt")
    return {case: (folder / case, found) for case, found in zip(made, logits, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_gives_the_same_logits(made: dict[str, Made], exported: Exported, case: str) -> None:
    assert difference(exported[case][1], made[case].logits) < 1e-5
    assert difference(exported[case][1], made[case].base_logits) > 0.05


@pytest.mark.parametrize("case", CASES)
def test_the_factors_are_our_own_and_zeros(made: dict[str, Made], exported: Exported, case: str) -> None:
    saved, folder = made[case].saved, exported[case][0]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, layer in saved.layers.items():
        rank = max(layer.r1, layer.r2)
        B1, A1, B2, A2 = saved.factors(name)
        for letter, B, A in (("1", B1, A1), ("2", B2, A2)):
            w_a, w_b = (tensors.pop(f"base_model.model.{name}.hada_w{letter}_{end}") for end in "ab")
            assert (w_a.shape, w_b.shape) == ((layer.m, rank), (rank, layer.n))
            assert torch.equal(w_a[:, : len(A)], B)
            assert torch.equal(w_b[: len(A)], A)
            assert not w_a[:, len(A) :].any()
            assert not w_b[len(A) :].any()
    assert tensors.keys() == set(saved.whole.values())


def test_what_was_trained_whole_is_there(made: dict[str, Made]) -> None:
    """The comparisons above would pass on adapters that have no such parameters."""
    assert "lm_head.weight" in made["qwen2-head"].saved.whole
    assert "model.layers.0.self_attn.k_proj.bias" in made["qwen2-biases-of-a-saved-module"].saved.whole


def test_one_rank_and_alpha_need_no_patterns(made: dict[str, Made], exported: Exported) -> None:
    settings = json.loads((exported["llama"][0] / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["rank_pattern"], settings["alpha_pattern"]) == ("LOHA", 5, {}, {})
    assert settings["alpha"] == pytest.approx(4.0**2 / 15**0.5 * 5, rel=1e-15)
    settings = json.loads((exported["mistral-patterns"][0] / "adapter_config.json").read_text())
    ranks = {f"^model\\.layers\\.{index}\\.self_attn\\.q_proj": 6 for index in (0, 1)}
    assert settings["rank_pattern"] == ranks | {r"^model\.layers\.1\.mlp\.down_proj": 4}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shorter_dtypes(made: dict[str, Made], tmp_path: Path, dtype: Any) -> None:
    saved = made["qwen2-head"].saved
    write_loha(saved, tmp_path, made["qwen2-head"].kinds, dtype=dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(saved.layers))
    assert torch.equal(tensors[f"base_model.model.{name}.hada_w2_b"], saved.factors(name).A2.to(getattr(torch, dtype)))
    assert torch.equal(tensors["base_model.model.lm_head.weight"], saved.parameter("lm_head.weight"))


def test_refusals(made: dict[str, Made], tmp_path: Path) -> None:
    gpt2 = make_adapter(make_base("gpt2", tmp_path / "gpt2"), tmp_path / "on-gpt2", target_modules=["c_attn"])
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn is a transposed layer \(Conv1D, as in GPT-2\), which"):
        write_loha(gpt2.saved, tmp_path, gpt2.kinds)
    one = made["llama"]
    with pytest.raises(ModelError, match="is a convolution, which PEFT's LoHa does not adapt"):
        write_loha(one.saved, tmp_path, dict.fromkeys(one.kinds, "convolution"))
    qwen2 = make_base("qwen2", tmp_path / "qwen2")
    for bias in ("all", "abba_only"):
        biased = make_adapter(qwen2, tmp_path / bias, target_modules=["q_proj", "v_proj"], bias=bias)
        with pytest.raises(
            ModelError, match=r"has trained biases, such as model\.layers\..*\.bias, which PEFT's LoHa has no place"
        ):
            write_loha(biased.saved, tmp_path, biased.kinds)
    saved = changed(one.path, tmp_path, ".abba_A1", lambda tensor: tensor * 1e7)
    with pytest.raises(ModelError, match=r"its factors reach .*, too large for float16; use bfloat16"):
        write_loha(saved, tmp_path, one.kinds, dtype="float16")
