"""Bad input of every kind ends in one clear message, never in a traceback. ABBA_FUZZ=20 runs twenty times as many cases."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from models import write_adapter
from mutations import ODD, VALUES, cases, damaged, mutated
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from abba_cli.data import prepare
from abba_cli.errors import AbbaError
from abba_cli.recipe import DataSection
from abba_cli.recipe_file import load_recipe
from abba_cli.rundir import ADAPTER_FILES, RunDir, open_run
from abba_cli.saved_adapter import open_adapter

RECIPE: dict[str, Any] = {
    "model": {"name": "a/b", "quantization": "nf4", "dtype": "bfloat16"},
    "adapter": {"r1": 16, "r2": 8, "alpha": 16, "targets": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": [4, 2]}},
    "data": {
        "train": [{"path": "rows.jsonl", "weight": 0.5, "split": "train[:10]"}, "more.csv"],
        "template": "chat",
        "packing": True,
    },
    "training": {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "scheduler": "cosine"},
    "evaluation": {"every_steps": None},
    "checkpoints": {"every_steps": 2, "keep": 2},
    "output": "out/x",
}
KEYS = [
    "model.name",
    "data.train.0.path",
    "adapter.rank_pattern.q_proj",
    "training.learning_rate",
    "adapter.targets",
    "output",
    "a.b",
]
ROWS = [{"question": "What is 1 + 1?", "answer": "2"}, {"question": "And 2 + 2?", "answer": "4"}]


def check(error: AbbaError) -> None:
    """A message that a person can read: something in it, no traceback, no inside of a library."""
    message = str(error)
    assert message.strip()
    assert "Traceback" not in message
    assert " object at 0x" not in message


def told(call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except AbbaError as error:
        check(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def adapter(folder: Path, tiny_llama: Path) -> Path:
    return write_adapter(folder / "adapter", tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@cases(1500)
@given(tree=mutated(RECIPE))
def test_recipes(tree: Any, folder: Path) -> None:
    file = folder / "recipe.yaml"
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
        file.write_text(yaml.safe_dump(tree))
        told(load_recipe, file, [])


@cases(500)
@given(content=damaged(yaml.safe_dump(RECIPE).encode()) | st.binary(max_size=60))
def test_recipe_files(content: bytes, folder: Path) -> None:
    file = folder / "damaged.yaml"
    file.write_bytes(content)
    told(load_recipe, file, [])


@cases(1500)
@given(overrides=st.lists(st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(KEYS), ODD | VALUES), max_size=3))
def test_overrides(overrides: list[str], folder: Path) -> None:
    file = folder / "good.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    told(load_recipe, file, overrides)


@cases(700)
@given(rows=st.lists(mutated(ROWS[0]) | VALUES, max_size=3), suffix=st.sampled_from([".jsonl", ".json", ".yaml"]))
def test_rows_of_data(rows: list[Any], suffix: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = folder / f"rows{suffix}"
    lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    told(prepare, DataSection.model_validate({"train": str(file)}), tokenizer, 0)


@cases(500)
@given(
    content=damaged("\n".join(map(json.dumps, ROWS)).encode()) | damaged(b"question,answer\n1+1,2\n2+2,4\n"),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz", ".arrow"]),
)
def test_data_files(content: bytes, suffix: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = folder / f"file{suffix}"
    file.write_bytes(content)
    told(prepare, DataSection.model_validate({"train": str(file)}), tokenizer, 0)


@cases(300)
@given(data=st.data())
@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # PEFT's, of a later version's settings
def test_adapter_directories(name: str, data: st.DataObject, adapter: Path) -> None:
    good = (adapter / name).read_bytes()
    try:
        if name.endswith(".json") and data.draw(st.booleans()):
            (adapter / name).write_text(json.dumps(data.draw(mutated(json.loads(good)))))
        else:
            (adapter / name).write_bytes(data.draw(damaged(good)))
        told(open_adapter, adapter)
    finally:
        (adapter / name).write_bytes(good)


@cases(300)
@given(
    content=damaged(json.dumps({"abba": "0.1.0", "outcome": {"steps": 2, "planned_steps": 2}}).encode()) | st.binary(max_size=30)
)
@example(content=b"[]")
@example(content=b'{"abba": 1, "outcome": 7}')
def test_run_directories(content: bytes, folder: Path) -> None:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "provenance.json").write_bytes(content)
    (run / "metrics.jsonl").write_bytes(content)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(RECIPE | {"output": str(run)}))
    told(open_run, load_recipe(file, []))
    told(RunDir(run).metrics)
