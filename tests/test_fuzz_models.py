"""Damaged adapters, bases, runs and imports end in one clear message, never in a traceback, and write nothing elsewhere."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluation.harness_rows import write_tokenizer
from fuzzing import run_case
from hypothesis import given
from hypothesis import strategies as st
from models import write_adapter, write_model
from mutations import cases, damaged, mutated
from peft import LoHaConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abba_cli.rundir import ADAPTER_FILES
from abba_cli.training import train

# The libraries warn of settings that they doubt; what is asked here is how it ends.
pytestmark = pytest.mark.filterwarnings("ignore")

BASE_FILES = ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]
RUN_FILES = ["provenance.json", "recipe.yaml", "metrics.jsonl", "checkpoints/checkpoint-1/manifest.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base in two files, an adapter for it, and a folder that nothing may be written to beside."""
    folder = tmp_path_factory.mktemp("fuzz")
    base = write_model(folder / "base", write_tokenizer(folder / "tokenizer"), max_shard_size="60KB")
    write_adapter(folder / "adapter", base)
    before = set(folder.iterdir())
    yield folder
    assert {path.name for path in set(folder.iterdir()) - before} <= {"out", "run", "run.yaml", "rows.jsonl", "loha", "pickled"}


def spoilt(data: st.DataObject, file: Path) -> bytes:
    """The content of a file, damaged; that of JSON and YAML now and then with other values only."""
    good = file.read_bytes()
    if file.suffix in (".json", ".yaml") and data.draw(st.booleans()):
        tree = data.draw(mutated(yaml.safe_load(good)))
        return (json.dumps(tree) if file.suffix == ".json" else yaml.safe_dump(tree)).encode(errors="surrogatepass")
    return data.draw(damaged(good))


class Spoiling:
    """A file with another content while a case runs."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file, self.content, self.good = file, content, file.read_bytes()

    def __enter__(self) -> None:
        self.file.write_bytes(self.content)

    def __exit__(self, *error: object) -> None:
        self.file.write_bytes(self.good)


def test_the_undamaged_ones_work(folder: Path) -> None:
    assert run_case("adapters", *export(folder, "abba")) == (0, run_case("adapters", *export(folder, "abba"))[1])
    assert run_case("bases", *merge(folder))[0] == 0


def export(folder: Path, format: str) -> list[object]:
    output = ["--output", folder / "out", "--overwrite"]
    shutil.rmtree(folder / "out", ignore_errors=True)
    return ["export", "--format", format, "--adapter", folder / "adapter", *output]


def merge(folder: Path) -> list[object]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    return ["merge", "--adapter", folder / "adapter", "--no-verify", "--output", folder / "out"]


@cases(200)
@given(data=st.data())
@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_adapter_directories(name: str, data: st.DataObject, folder: Path) -> None:
    file = folder / "adapter" / name
    with Spoiling(file, spoilt(data, file)):
        run_case("adapters", *export(folder, data.draw(st.sampled_from(["abba", "abba", "loha", "lora"]))))


@cases(30)
@given(data=st.data())
@pytest.mark.parametrize("name", [*BASE_FILES, "model-00001-of-*.safetensors"])
def test_bases(name: str, data: st.DataObject, folder: Path) -> None:
    [file] = (folder / "base").glob(name)
    with Spoiling(file, spoilt(data, file)):
        run_case("bases", *merge(folder))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(4)))
    recipe: dict[str, Any] = {
        "model": {"name": str(folder / "base"), "dtype": "float32"},
        "adapter": {"r1": 2, "r2": 2},
        "data": {"train": "rows.jsonl", "template": "alpaca"},
        "training": {"max_steps": 1, "batch_size": 1},
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    made = train(folder / "run.yaml").path
    more = ("--set", "training.max_steps=2", "--num-processes", "3")
    assert "which 3 processes cannot share evenly" in run_case("runs", "train", folder / "run.yaml", "--dry-run", *more)[1]
    return made


@cases(30)
@given(data=st.data())
@pytest.mark.parametrize("name", RUN_FILES)
def test_runs_to_go_on_with(name: str, data: st.DataObject, run: Path, folder: Path) -> None:
    """With one more step to make, so that the run's record, checkpoint and data are looked at; one row is none for three."""
    file = run / name
    with Spoiling(file, spoilt(data, file)):
        more = ["--set", "training.max_steps=2", "--num-processes", "3"]
        run_case("runs", "train", folder / "run.yaml", "--dry-run", *more)
        run_case("runs", "export", "--adapter", run, "--format", "abba", "--output", folder / "out", "--overwrite")


@pytest.fixture(scope="module")
def foreign(folder: Path) -> Path:
    """A LoHa of PEFT's, and the same pickled."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder / "loha"))
    (folder / "pickled").mkdir()
    shutil.copyfile(folder / "loha" / "adapter_config.json", folder / "pickled" / "adapter_config.json")
    torch.save(load_file(folder / "loha" / "adapter_model.safetensors"), folder / "pickled" / "adapter_model.bin")
    return folder


@cases(60)
@given(data=st.data())
@pytest.mark.parametrize("name", ["loha/adapter_config.json", "loha/adapter_model.safetensors", "pickled/adapter_model.bin"])
def test_imports(name: str, data: st.DataObject, foreign: Path) -> None:
    file = foreign / name
    shutil.rmtree(foreign / "out", ignore_errors=True)
    with Spoiling(file, spoilt(data, file)):
        run_case("imports", "import", file.parent, "--base", foreign / "base", "--output", foreign / "out")
