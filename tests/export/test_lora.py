"""ABBA as LoRA: stock PEFT computes the same, and a smaller rank is the best approximation there is."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import Made, changed, dense_delta, difference, load_base, logits_of, make_adapter, make_base, stock_logits

from abba_cli.errors import ModelError
from abba_cli.export.lora import exact_rank, lora_layers, write_lora

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
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
    "qwen2-own-biases": ("qwen2", {"bias": "abba_only", "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "qwen2-all-biases": ("qwen2", {"bias": "all", "target_modules": ["k_proj", "up_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"c_fc": [1, 4]}}),
    "gpt2-biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "gpt2-norm": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["ln_f"]}),
    "llama-head": ("llama", {"modules_to_save": ["lm_head"], "exclude_modules": ["v_proj"]}),
    "llama-embeddings": ("llama", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "up_proj"]}),
    "llama-adapted-head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "llama-past-full-rank": ("llama", {"r1": 9, "r2": 7, "target_modules": ["o_proj"]}),
    "llama-nf4": ("llama64", {"nf4": True, "target_modules": ["q_proj", "down_proj"]}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("made")
    bases = {name: make_base(name, folder / "bases" / name) for name in {architecture for architecture, _ in CASES.values()}}
    return {case: make_adapter(bases[name], folder / case, **settings) for case, (name, settings) in CASES.items()}


@pytest.fixture(scope="module")
def exported(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every case's export and what stock PEFT computes with it, all in one other process."""
    folder = tmp_path_factory.mktemp("exported")
    for case, one in made.items():
        (folder / case).mkdir()
        report = write_lora(one.saved, folder / case, one.kinds)
        assert (report.error, set(report.errors.values())) == (0.0, {0.0})
        assert report.errors.keys() == one.saved.layers.keys()
    jobs = {case: (one, folder / case) for case, one in made.items()}
    for case in ("llama", "gpt2"):
        jobs[f"{case} at rank 3"] = (made[case], folder / f"{case} at rank 3")
        jobs[f"{case} at rank 3"][1].mkdir()
        write_lora(made[case].saved, jobs[f"{case} at rank 3"][1], made[case].kinds, rank=3)
    logits = stock_logits(list(jobs.values()), folder / "logits.pt")
    return {case: (path, found) for (case, (_, path)), found in zip(jobs.items(), logits, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_gives_the_same_logits(
    made: dict[str, Made], exported: dict[str, tuple[Path, torch.Tensor]], case: str
) -> None:
    assert difference(exported[case][1], made[case].logits) < 1e-5
    assert difference(exported[case][1], made[case].base_logits) > 0.05


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_one_that_servers_read(
    made: dict[str, Made], exported: dict[str, tuple[Path, torch.Tensor]], case: str
) -> None:
    """One rank everywhere and in the configuration, no patterns, nothing but LoRA's names and what was trained whole."""
    saved, folder = made[case].saved, exported[case][0]
    settings = json.loads((folder / "adapter_config.json").read_text())
    rank = max(layer.r1 * layer.r2 for layer in saved.layers.values())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", rank, rank)
    assert (settings["rank_pattern"], settings["alpha_pattern"], settings["use_rslora"]) == ({}, {}, False)
    assert settings["fan_in_fan_out"] == ("gpt2" in case)
    assert settings["base_model_name_or_path"] == str(made[case].base)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, layer in saved.layers.items():
        assert tensors.pop(f"base_model.model.{name}.lora_A.weight").shape == (rank, layer.n)
        assert tensors.pop(f"base_model.model.{name}.lora_B.weight").shape == (layer.m, rank)
    assert tensors.keys() == set(saved.whole.values())
    assert all(torch.equal(tensors[key], saved.parameter(name)) for name, key in saved.whole.items())


def test_what_was_trained_whole_is_there(made: dict[str, Made]) -> None:
    """The comparisons above would pass on adapters that have no such parameters."""
    for case, name in {
        "qwen2-own-biases": "model.layers.0.self_attn.q_proj.bias",
        "qwen2-all-biases": "model.layers.0.self_attn.v_proj.bias",
        "gpt2-biases": "transformer.h.0.attn.c_attn.bias",
        "gpt2-norm": "transformer.ln_f.weight",
        "llama-head": "lm_head.weight",
        "llama-embeddings": "model.embed_tokens.weight",
    }.items():
        assert name in made[case].saved.whole


@pytest.mark.parametrize("case", ["mistral-patterns", "gpt2", "llama-past-full-rank"])
@pytest.mark.parametrize("rank", [1, 4, 11, 14, 40])
def test_a_smaller_rank_is_the_best_approximation(made: dict[str, Made], tmp_path: Path, case: str, rank: int) -> None:
    saved = made[case].saved
    errors, lost, whole = {}, 0.0, 0.0
    for layer in lora_layers(saved, rank):
        delta = dense_delta(saved, layer.name)
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        errors[layer.name] = float((delta - best).norm() / delta.norm())
        assert (layer.A.shape, layer.B.shape) == ((rank, delta.shape[1]), (delta.shape[0], rank))
        assert layer.A.dtype == layer.B.dtype == torch.float32
        assert float((layer.B.double() @ layer.A.double() - best).norm() / delta.norm()) < 1e-6
        assert layer.error == pytest.approx(errors[layer.name], rel=1e-6, abs=1e-9)
        lost += float((delta - best).norm()) ** 2
        whole += float(delta.norm()) ** 2
        if saved.layers[layer.name].r1 * saved.layers[layer.name].r2 <= rank:
            assert layer.error == 0.0
    assert errors.keys() == saved.layers.keys()
    report = write_lora(saved, tmp_path, made[case].kinds, rank=rank)
    assert report.rank == rank
    assert report.errors == pytest.approx(errors, rel=1e-6, abs=1e-9)
    assert report.error == pytest.approx(math.sqrt(lost / whole), rel=1e-6, abs=1e-9)
    assert (report.error > 1e-3) == (rank < min(exact_rank(saved), 36)), "full rank is 36, which loses nothing"


def test_both_factors_of_an_approximation_are_of_one_size(made: dict[str, Made]) -> None:
    layer = next(iter(lora_layers(made["llama"].saved, 4)))
    torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0))


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_stock_peft_reads_an_approximation(
    made: dict[str, Made], exported: dict[str, tuple[Path, torch.Tensor]], case: str
) -> None:
    """Against the base with the dense best approximation added by hand."""
    model = load_base(made[case].base)
    for name in made[case].saved.layers:
        U, S, Vh = torch.linalg.svd(dense_delta(made[case].saved, name), full_matrices=False)
        best = ((U[:, :3] * S[:3]) @ Vh[:3]).float()
        model.get_submodule(name).weight.data += best.T if case == "gpt2" else best
    assert difference(exported[f"{case} at rank 3"][1], logits_of(model)) < 1e-5
    assert difference(exported[f"{case} at rank 3"][1], made[case].logits) > 1e-2


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("case", ["llama-head", "gpt2"])
def test_shorter_dtypes_round_once(made: dict[str, Made], tmp_path: Path, case: str, dtype: Any, digits: int) -> None:
    saved = made[case].saved
    write_lora(saved, tmp_path, made[case].kinds, dtype=dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer in saved.layers:
        A, B = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
        assert A.dtype == B.dtype == getattr(torch, dtype)
        delta = dense_delta(saved, layer)
        error = float((B.double() @ A.double() - delta).norm() / delta.norm())
        assert 2.0 ** -(digits + 4) < error < 2.0**-digits
    for name, key in saved.whole.items():
        assert torch.equal(tensors[key], saved.parameter(name)), "parameters trained whole keep their dtype"
        assert tensors[key].dtype == torch.float32


@pytest.mark.parametrize("shorthand", ["all-linear", None])
def test_a_shorthand_becomes_the_layers_names(made: dict[str, Made], tmp_path: Path, shorthand: str | None) -> None:
    """PEFT itself writes names; a configuration written by hand may leave them to a table that other readers lack."""
    saved = changed(made["llama"].path, tmp_path, "none of them", torch.zeros_like)
    saved.config.target_modules = shorthand
    write_lora(saved, tmp_path, made["llama"].kinds)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == saved.layers.keys()


def test_tensors_of_several_widths_are_aligned(made: dict[str, Made], tmp_path: Path) -> None:
    """A tensor that began at half a number could not be mapped; 61 x 35 is odd."""
    saved = changed(made["llama-head"].path, tmp_path, "lm_head", lambda tensor: tensor[:, :35].bfloat16().contiguous())
    for dtype in ("float32", "float16"):
        (tmp_path / dtype).mkdir()
        write_lora(saved, tmp_path / dtype, made["llama-head"].kinds, dtype=dtype)  # type: ignore[arg-type]
        file = tmp_path / dtype / "adapter_model.safetensors"
        assert torch.equal(load_file(file)["base_model.model.lm_head.weight"], saved.parameter("lm_head.weight"))
        size = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + size])
        widths = {"F32": 4, "BF16": 2, "F16": 2}
        assert all(one["data_offsets"][0] % widths[one["dtype"]] == 0 for one in header.values() if "dtype" in one)


def test_the_progress_counts_layers(made: dict[str, Made], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_lora(made["gpt2"].saved, tmp_path, made["gpt2"].kinds, progress=lambda done, total: seen.append((done, total)))
    layers = len(made["gpt2"].saved.layers)
    assert seen == [(done, layers) for done in range(layers + 1)]


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 8), (8, 8), (9, 16), (256, 256), (257, 320), (321, 512), (512, 512), (513, None)]
)
def test_what_vllm_needs(made: dict[str, Made], tmp_path: Path, rank: int, expected: int | None) -> None:
    one = made["gpt2-biases"]
    assert write_lora(one.saved, tmp_path, one.kinds, rank=rank).vllm_max_lora_rank == expected


def test_an_adapter_that_was_never_trained(made: dict[str, Made], tmp_path: Path) -> None:
    saved = changed(made["llama"].path, tmp_path, ".abba_B2", torch.zeros_like)
    for rank in (None, 2):
        assert all(layer.error == 0.0 and not (layer.B @ layer.A).any() for layer in lora_layers(saved, rank))
    (tmp_path / "out").mkdir()
    assert write_lora(saved, tmp_path / "out", made["llama"].kinds, rank=2).error == 0.0


def test_refusals(made: dict[str, Made], tmp_path: Path) -> None:
    one = made["llama"]
    first, second, *_ = one.kinds
    with pytest.raises(ModelError, match=f"{second} is a convolution, which is not exported as LoRA"):
        write_lora(one.saved, tmp_path, one.kinds | {second: "convolution"})
    with pytest.raises(ModelError, match=f"{first} is a linear layer and {second} a transposed one"):
        write_lora(one.saved, tmp_path, one.kinds | {second: "transposed"})
    for rank in (0, -3):
        with pytest.raises(
            ModelError, match=rf"a LoRA of rank {rank} was asked for; expected 1 or more \(the exact one has rank 15\)"
        ):
            write_lora(one.saved, tmp_path, one.kinds, rank=rank)
        with pytest.raises(ModelError, match="expected 1 or more"):
            lora_layers(one.saved, rank)
    saved = changed(one.path, tmp_path, ".abba_B1", lambda tensor: tensor * 1e7)
    with pytest.raises(ModelError, match=r"its factors reach .*e\+0., too large for float16; use bfloat16"):
        write_lora(saved, tmp_path, one.kinds, dtype="float16")
