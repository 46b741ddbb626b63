"""Every shipped recipe: it parses, says what it is for, and holds what the paper and the issue ask for."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from abba_cli.recipe import Recipe
from abba_cli.recipe_file import dump_recipe, load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(FOLDER.glob("*.yaml"))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PAPER = {
    "commonsense-llama-3.2-1b": ("meta-llama/Llama-3.2-1B", None),
    "commonsense-llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 32.0),
    "metamath-mistral-7b": ("mistralai/Mistral-7B-v0.1", 22.6),
    "metamath-gemma-2-9b": ("google/gemma-2-9b", None),
    "codefeedback-llama-3.1-8b": ("meta-llama/Llama-3.1-8B", None),
}

GSM8K_LLAMA: dict[str, Any] = {
    "model": {"name": "meta-llama/Llama-3.2-3B", "gguf_file": None, "dtype": "bfloat16", "quantization": "none"},
    "adapter": {"method": "abba", "r1": 16, "r2": 16, "alpha": 32, "dropout": 0.0, "targets": TARGETS},
    "data": {
        "train": [
            {
                "path": "meta-math/MetaMathQA",
                "split": "train[:20000]",
                "prompt": "{{ query }}",
                "completion": "{{ response }}",
            }
        ],
        "eval": [],
        "template": "alpaca",
        "max_length_tokens": 512,
        "packing": False,
    },
    "training": {
        "epochs": 1,
        "max_steps": None,
        "batch_size": 1,
        "gradient_accumulation": 32,
        "learning_rate": 0.001,
        "scheduler": "cosine",
        "warmup_ratio": 0.02,
        "seed": 42,
    },
    "checkpoints": {"every_steps": 200, "keep": 2},
    "output": "out/gsm8k-llama",
}


def shipped(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


def test_the_set_is_complete() -> None:
    names = {path.stem for path in SHIPPED}
    assert names >= {*PAPER, "quickstart", "gsm8k-llama", "gsm8k-smollm2", "commonsense-smollm2", "chat"}
    assert any(load_recipe(path).model.quantization == "nf4" for path in SHIPPED)


def test_it_parses_and_is_named_after_its_output(path: Path) -> None:
    assert load_recipe(path).output == f"out/{path.stem}"


def test_what_it_resolves_to_reads_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_its_header_says_what_it_does_what_it_needs_and_how_to_launch_it(path: Path) -> None:
    header = path.read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    says, needs, launch = (header.index(f"# {title}: ") for title in ("What it does", "What it needs", "How to launch"))
    assert says == 0 < needs < launch
    assert f"abba train recipes/{path.name}" in header[launch:]


def test_the_overrides_in_its_header_work(path: Path) -> None:
    header = path.read_text().split("\nmodel:")[0]
    overrides = re.findall(r"--set (\S+=[^\s.]\S*)", header)
    assert load_recipe(path, overrides).output == load_recipe(path).output


def test_it_names_no_path_of_one_machine(path: Path) -> None:
    plain = yaml.safe_load(path.read_text())
    sources = [*plain["data"]["train"], *plain["data"].get("eval", [])] if isinstance(plain["data"]["train"], list) else []
    assert not any(source["path"].startswith(("/", "~", "..")) for source in sources)
    assert not re.search(r"[\s=](/[a-z]+/|~/)", path.read_text())


def test_the_recipe_of_the_issue_works_as_written() -> None:
    resolved = shipped("gsm8k-llama").model_dump(mode="json")
    for section, keys in GSM8K_LLAMA.items():
        if isinstance(keys, dict):
            found = {key: resolved[section][key] for key in keys}
            if section == "data":
                found["train"] = [{key: source[key] for key in keys["train"][0]} for source in found["train"]]
            assert found == keys
        else:
            assert resolved[section] == keys
    assert yaml.safe_load((FOLDER / "gsm8k-llama.yaml").read_text())["training"].keys() == GSM8K_LLAMA["training"].keys()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_have_its_settings(name: str) -> None:
    recipe = shipped(name)
    base, alpha = PAPER[name]
    commonsense = name.startswith("commonsense")
    assert (recipe.model.name, recipe.model.dtype, recipe.model.quantization) == (base, "bfloat16", "none")
    assert (recipe.adapter.r1, recipe.adapter.r2, recipe.adapter.targets) == (16, 16, TARGETS)
    assert recipe.adapter.alpha == (alpha or 16.0)
    assert recipe.adapter.dropout == (0.05 if commonsense else 0.0)
    training = recipe.training
    assert (training.learning_rate, training.warmup_ratio, training.optimizer) == (1e-3, 0.02, "adamw")
    assert (training.batch_size, training.gradient_accumulation) == ((6, 24) if commonsense else (1, 32))
    assert (training.scheduler, training.epochs) == (("linear", 2) if commonsense else ("cosine", 1))
    assert recipe.data.template == "alpaca"
    assert recipe.data.supervise == "completion"
    if name.startswith("metamath"):
        assert (recipe.data.train[0].path, recipe.data.train[0].split) == ("meta-math/MetaMathQA", "train[:20000]")
    if not name.startswith("codefeedback"):
        assert recipe.data.max_length_tokens == (256 if commonsense else 512)
