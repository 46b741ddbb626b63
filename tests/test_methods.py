"""The methods to compare with: a recipe trains them at equal size, goes on, and merges to what PEFT itself makes of them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA_LAYERS, logits, relative, write_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abba_cli import RunDir, train
from abba_cli.errors import ModelError, RecipeError
from abba_cli.events import Event, Planned
from abba_cli.exporting import export
from abba_cli.merging import merge

RecipeFile = Callable[..., Path]
METHODS = {
    "lora": "{method: lora, budget: {rank: 8}}",
    "rslora": "{method: rslora, budget: {rank: 8}, alpha_pattern: {v_proj: 3}}",
    "dora": "{method: dora, budget: {rank: 8}, rank_pattern: {q_proj: 3}}",
    "pissa": "{method: pissa, budget: {rank: 8}, rank_pattern: {q_proj: 3}, alpha_pattern: {v_proj: 3}}",
    "hira": "{method: hira, budget: {rank: 8}}",
    "loha": "{method: loha, budget: {rank: 8}, rank_pattern: {down_proj: 2}}",
    "sum": "{combine: sum, budget: {rank: 8}, r1: 3, alpha: 2}",
    "chain": "{pairs: 4, budget: {rank: 8}}",
    "full": "{method: full}",
}


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers matter in its logits."""
    return write_model(tmp_path_factory.mktemp("bases") / "base", tiny_llama)


def louder(run: RunDir, folder: Path) -> Path:
    """The run's adapter with factors that have gone far from where they started."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((run.path / "adapter_config.json").read_bytes())
    tensors = load_file(run.path / "adapter_model.safetensors")
    torch.manual_seed(3)
    save_file(
        {key: one + 0.2 * one.std().clamp(min=0.3) * torch.randn_like(one) for key, one in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return folder


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of base + adapter, by stock PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    return logits(model.eval(), base)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_goes_on_and_merges(method: str, base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = recipe_file(model=f"{{name: {base}, dtype: float32}}", adapter=METHODS[method])
    whole = train(recipe, [f"output={tmp_path / 'whole'}"])
    losses = [row["loss"] for row in whole.metrics() if "loss" in row]
    assert losses[-1] < losses[0]
    halted = train(recipe, ["training.max_steps=4", "training.scheduler=constant", f"output={tmp_path / 'halted'}"])
    reference = train(recipe, ["training.scheduler=constant", f"output={tmp_path / 'reference'}"])
    train(recipe, ["training.scheduler=constant", f"output={halted.path}"])
    expected, found = (load_file(one.path / "adapter_model.safetensors") for one in (reference, halted))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    adapter = louder(whole, tmp_path / "louder")
    merged = merge([adapter], output=tmp_path / "merged")
    assert merged.verification is not None
    answers = by_peft(base, adapter)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), base), answers) > 1e-2
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged.path), base), answers) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_an_export_answers_alike_or_is_refused(method: str, base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = recipe_file(model=f"{{name: {base}, dtype: float32}}", adapter=METHODS[method])
    adapter = louder(train(recipe, ["training.max_steps=1"]), tmp_path / "louder")
    for form in ("lora", "loha"):
        if method in ("dora", "hira", "full"):
            reason = "of full rank" if method == "full" else "not added"
            with pytest.raises(ModelError, match=rf"{reason}, which {form} cannot hold"):
                export(adapter, format=form, output=tmp_path / form)
            continue
        written = export(adapter, format=form, output=tmp_path / form)
        assert relative(by_peft(base, written.path), by_peft(base, adapter)) < 1e-5
    small = export(adapter, format="abba", dtype="bfloat16", output=tmp_path / "small")
    stored = load_file(small.path / "adapter_model.safetensors")
    assert {one.dtype for one in stored.values()} == {torch.bfloat16}
    assert stored.keys() == load_file(adapter / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("method", METHODS)
def test_its_answers_are_not_taken_for_the_base_s(method: str, base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    """An evaluation beside the base keeps answers by these digests."""
    from abba_cli.evaluation.fingerprint import fingerprint

    run = train(recipe_file(model=f"{{name: {base}, dtype: float32}}", adapter=METHODS[method]), ["training.max_steps=1"])
    adapter = louder(run, tmp_path / "louder")
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    digest = fingerprint(alone)
    adapted = PeftModel.from_pretrained(alone, str(adapter))
    assert fingerprint(adapted, adapter_off=True) == digest
    assert fingerprint(adapted) != digest
    first = fingerprint(adapted)
    with torch.no_grad():
        next(one for name, one in adapted.named_parameters() if f".{adapted.base_model.prefix}" in name).add_(0.5)
    assert fingerprint(adapted) != first


def test_all_have_the_size_of_the_budget(base: Path, recipe_file: RecipeFile) -> None:
    from abba_cli.preparation import prepare
    from abba_cli.recipe_file import load_recipe

    sizes = {}
    for method in ("abba", *(one for one in METHODS if one != "full")):
        section = METHODS.get(method, "{budget: {rank: 8}}")
        section = section if "pattern" not in section else f"{{method: {method}, budget: {{rank: 8}}}}"
        plans: list[Event] = []
        prepare(load_recipe(recipe_file(model=f"{{name: {base}}}", adapter=section)), listen=plans.append)
        plan = next(event.plan for event in plans if isinstance(event, Planned))
        sizes[method] = plan.trainable
        assert plan.memory.gap == ""
        assert re.search(
            r"r1 = 4, r2 = 4 |r1 = 3, r2 = 5 |of rank 8\b|\(B2 A2\), of rank 4,|each pair of rank 2,", plan.update
        ), plan.update
    outputs = 2 * sum(
        {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 72, "up_proj": 72, "down_proj": 32}.values()
    )
    assert sizes.pop("dora") == sizes["lora"] + outputs
    assert set(sizes.values()) == {sizes["lora"]}


def test_several_adapters_of_different_methods_merge(base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    adapters = {}
    for method in ("hira", "loha", "sum"):
        run = train(
            recipe_file(model=f"{{name: {base}, dtype: float32}}", adapter=METHODS[method]),
            ["training.max_steps=1", f"output={tmp_path / method}"],
        )
        adapters[method] = louder(run, tmp_path / f"{method}-louder")
    merged = merge(list(adapters.values()), weights=[0.5, -1.0, 2.0], output=tmp_path / "merged", verify=False)
    name = "model.layers.1.mlp.down_proj"
    files = {method: load_file(path / "adapter_model.safetensors") for method, path in adapters.items()}
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].double()

    def factor(method: str, key: str) -> torch.Tensor:
        return files[method][f"base_model.model.{name}.{key}"].double()

    hira = weight * (factor("hira", "hira_B") @ factor("hira", "hira_A"))
    w1, w2 = (factor("loha", f"hada_w{one}_a") @ factor("loha", f"hada_w{one}_b") for one in (1, 2))
    loha = w1 * w2 * 4 / 2  # alpha is the method's rank 4, this layer's is 2
    added = 2 * 2 / (3 * 5) ** 0.5 * factor("sum", "lora_B.weight") @ factor("sum", "lora_A.weight")
    expected = weight + 0.5 * hira - loha + 2 * added
    found = load_file(merged.path / "model.safetensors")[f"{name}.weight"].double()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("section", [METHODS["lora"], METHODS["dora"]])
def test_on_four_bits(section: str, base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    run = train(recipe_file(model=f"{{name: {base}, quantization: nf4}}", adapter=section, training="{max_steps: 2}"))
    merged = merge([run.path], base_precision="dequantized", output=tmp_path / "merged")
    assert merged.verification is not None


def test_two_processes_train_it(base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    recipe = recipe_file(model=f"{{name: {base}, dtype: float32}}", adapter=METHODS["lora"])
    one = train(recipe, ["training.batch_size=2", "training.gradient_accumulation=1", f"output={tmp_path / 'one'}"])
    command = [sys.executable, "-m", "abba_cli", "train", str(recipe), "--num-processes", "2"]
    for setting in ("training.batch_size=1", "training.gradient_accumulation=1", f"output={tmp_path / 'two'}"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in run.metrics() if "loss" in row] for run in (one, RunDir(tmp_path / "two"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": "{method: lora, r1: 4}"}, "r1 does not go with method lora, which has rank, alpha, alpha_pattern, dropout"),
        ({"adapter": "{method: hira, alpha: 3}"}, "alpha does not go with method hira, which has rank, dropout"),
        ({"adapter": "{method: loha, dropout: 0.1}"}, "dropout does not go with method loha"),
        ({"adapter": "{rank: 4}"}, "rank does not go with method abba"),
        ({"adapter": "{method: lora, rank_pattern: {q_proj: [1, 2]}}"}, "lora has one rank: expected a number for each name"),
        ({"adapter": "{method: MoRA}"}, "MoRA is in no library that abba builds on; it has abba, lora, rslora, dora, hira, loha"),
        ({"adapter": "{budget: {rank: 8}, r1: 3, r2: 4}"}, "budget is 8 (m + n) parameters a layer, but the ranks given have 7"),
        ({"adapter": "{budget: {rank: 8}, r1: 4, r2: 5}"}, "budget is 8 (m + n) parameters a layer, but the ranks given have 9"),
        ({"adapter": "{method: lora, budget: {rank: 8}, rank: 9}"}, "budget is 8 (m + n) parameters a layer, but the ranks"),
        ({"adapter": "{method: full, rank: 4}"}, "rank does not go with method full, which has no size to set"),
        ({"adapter": "{method: full, budget: {rank: 4}}"}, "budget does not go with method full"),
        ({"adapter": "{method: lora, pairs: 4}"}, "pairs does not go with method lora"),
        ({"adapter": "{pairs: 3, init: random}"}, "a chain of 3 pairs takes no init of its own"),
        ({"adapter": "{pairs: 3, r1: 2, r2: 4}"}, "the pairs of a chain have one rank, but r1 is 2 and r2 is 4"),
        ({"adapter": "{pairs: 3}", "model": "{name: x, quantization: nf4}"}, "a chain of pairs takes no nf4 base"),
        ({"adapter": "{combine: sum, init: svd}"}, "combine: sum starts with both B at zero"),
        (
            {"adapter": "{method: loha}", "model": "{name: x, quantization: nf4}"},
            "loha takes no nf4 base",
        ),
        ({"adapter": "{method: dora}", "model": "{name: x, quantization: int8}"}, "dora takes no int8 base"),
        ({"adapter": "{method: dora}", "distributed": "{strategy: fsdp}"}, "fsdp trains abba alone"),
    ],
)
def test_what_does_not_go_together(sections: dict[str, str], message: str, recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError) as error:
        train(recipe_file(**sections))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_replication": [[0, 2]]}, "layer_replication is '[[0, 2]]' in its adapter_config.json, which abba does not read"),
        ({"megatron_config": {"a": 1}}, "megatron_config is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 5}, r"lora_B.weight is 32 x 8, expected 32 x 5 from the ranks 5"),
        ({"r": None}, "is broken"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"peft_type": "VERA"}, "holds a VERA adapter; expected an ABBA one, or one of LORA, HIRA, LOHA"),
    ],
)
def test_a_strange_lora_is_refused(
    settings: dict[str, Any], message: str, base: Path, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    run = train(recipe_file(model=f"{{name: {base}}}", adapter=METHODS["lora"], training="{max_steps: 1}"))
    file = run.path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelError) as error:
        merge([run.path], output=tmp_path / "merged")
    assert message in str(error.value)


@pytest.mark.parametrize("method", ["lora", "pissa", "hira", "full"])
def test_embeddings_are_no_target(method: str, base: Path, recipe_file: RecipeFile) -> None:
    with pytest.raises(ModelError, match=r"\['embed_tokens'\] matches an Embedding, which is no linear layer"):
        train(recipe_file(model=f"{{name: {base}}}", adapter=f"{{method: {method}, targets: [embed_tokens]}}"))


def test_another_method_in_the_directory_is_another_recipe(base: Path, recipe_file: RecipeFile) -> None:
    from abba_cli.errors import RunError

    train(recipe_file(model=f"{{name: {base}}}", adapter=METHODS["lora"], training="{max_steps: 1}"))
    with pytest.raises(RunError, match=r"adapter\.method: 'lora' there, 'hira' now"):
        train(recipe_file(model=f"{{name: {base}}}", adapter=METHODS["hira"], training="{max_steps: 1}"))


def test_the_layers_of_the_tests_are_those_of_the_recipe() -> None:
    """The sizes above are of these."""
    from abba_cli.recipe_adapter import AdapterSection

    assert AdapterSection().targets == LLAMA_LAYERS
