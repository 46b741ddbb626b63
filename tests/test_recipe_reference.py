"""The generated reference and JSON schema: complete, up to date, and true to what the loader accepts."""

import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from abba_cli.recipe import (
    AdapterSection,
    CheckpointsSection,
    DataSection,
    DistributedSection,
    EvaluationSection,
    LoggingSection,
    ModelSection,
    Recipe,
    SourceSection,
    TrainingSection,
)
from abba_cli.recipe_reference import accepted, keys_of, schema_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipe-reference.md").read_text()
SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "adapter": AdapterSection,
    "data": DataSection,
    "data.train.N": SourceSection,
    "training": TrainingSection,
    "evaluation": EvaluationSection,
    "checkpoints": CheckpointsSection,
    "distributed": DistributedSection,
    "logging": LoggingSection,
}


def rows() -> dict[str, list[str]]:
    cells = (line.strip("|").split(" | ") for line in PAGE.splitlines() if line.startswith("| `"))
    return {first.strip(" `"): rest for first, *rest in cells}


def test_the_page_has_every_key_in_the_schemas_order_and_no_other() -> None:
    expected = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    assert list(rows()) == [*expected, "output"]


def test_every_row_says_what_is_accepted_the_default_and_the_meaning() -> None:
    for key, cells in rows().items():
        assert len(cells) == 3, key
        assert all(cell.strip() for cell in cells), key
        section, _, name = key.rpartition(".")
        field = (SECTIONS[section] if section else Recipe).model_fields[name]
        if field.is_required():
            assert cells[1] == "required"
        else:
            assert json.loads(cells[1].strip("`")) == field.get_default()
        assert cells[2].strip() == field.description


def test_the_page_explains_paths_overrides_and_shows_a_recipe() -> None:
    example = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    Recipe.model_validate(yaml.safe_load(example[1]))
    assert "start at the recipe's folder" in PAGE
    assert "--set training.max_steps=30" in PAGE


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (("model", "dtype"), "float32, bfloat16 or float16"),
        (("adapter", "method"), "abba, lora, rslora, dora, hira, loha, pissa or full"),
        (("adapter", "r1"), "a whole number of at least 1 or null"),
        (("adapter", "alpha"), "a number above 0 or null"),
        (("adapter", "dropout"), "a number of at least 0 and below 1"),
        (("adapter", "targets"), "non-empty text or a non-empty list of them"),
        (("adapter", "exclude"), "non-empty text, a non-empty list of them or null"),
        (("adapter", "layers"), "a list of whole numbers of at least 0 or null"),
        (
            ("adapter", "rank_pattern"),
            "a section of names, each with a whole number of at least 1 or a list of 2 whole numbers of at least 1",
        ),
        (("adapter", "rank_pattern", "q_proj"), "a whole number of at least 1 or a list of 2 whole numbers of at least 1"),
        (("data", "train"), "a section of keys, non-empty text or a non-empty list of them"),
        (("data", "eval"), "a section of keys, non-empty text or a list of them"),
        (("data", "train", 0), "a section of keys or non-empty text"),
        (("data", "train", 3, "max_rows"), "a whole number of at least 1 or null"),
        (("data", "packing"), "true or false"),
        (("training",), "a section of keys"),
        (("output",), "non-empty text"),
    ],
)
def test_what_a_key_accepts_in_words(key: tuple[str | int, ...], words: str) -> None:
    assert accepted(schema_of(key)) == words


def test_keys_of_a_path_that_is_no_section() -> None:
    assert keys_of(("training", "seed")) == {}
    assert keys_of(("nowhere",)) == {}


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "-m", "abba_cli.recipe_reference", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_says_what_is_out_of_date_and_writing_mends_it(tmp_path: Path) -> None:
    for name in ("abba_cli", "docs", "recipes"):
        (tmp_path / name).mkdir()
    for file in [*(ROOT / "abba_cli").glob("*.py"), ROOT / "recipes" / "gsm8k-llama.yaml"]:
        (tmp_path / file.relative_to(ROOT)).write_text(file.read_text())
    (tmp_path / "docs" / "recipe-reference.md").write_text(PAGE)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "abba_cli.recipe_reference", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    stale = run("--check")
    assert stale.returncode == 1
    assert stale.stderr == "docs/recipe.schema.json out of date; run `make docs`\n"
    assert not (tmp_path / "docs" / "recipe.schema.json").exists()
    assert run().returncode == 0
    assert json.loads((tmp_path / "docs" / "recipe.schema.json").read_text()) == SCHEMA
    assert run("--check").returncode == 0


# A second, independent reading of the JSON schema: as an editor does it, with YAML 1.2 numbers and no knowledge of pydantic.


class EditorLoader(yaml.SafeLoader):
    """YAML 1.2: 1e-3 is a number."""


EditorLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
BOUNDED: dict[str, tuple[tuple[type, ...], Callable[[Any, Any], bool]]] = {
    "enum": ((object,), lambda value, values: value in values),
    "const": ((object,), operator.eq),
    "minimum": ((int, float), operator.ge),
    "exclusiveMinimum": ((int, float), operator.gt),
    "exclusiveMaximum": ((int, float), operator.lt),
    "minLength": ((str,), lambda value, least: len(value) >= least),
    "minItems": ((list,), lambda value, least: len(value) >= least),
    "maxItems": ((list,), lambda value, most: len(value) <= most),
}
ANNOTATIONS = {"title", "description", "default", "$schema", "$defs"}


def faults(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    for word, argument in schema.items():
        if word in ANNOTATIONS or (word == "required" and not isinstance(value, dict)):
            continue
        if word == "$ref":
            yield from faults(value, SCHEMA["$defs"][argument.rpartition("/")[2]], where)
        elif word == "anyOf":
            if all(list(faults(value, branch, where)) for branch in argument):
                yield f"{where}: {value!r} fits no branch"
        elif word == "type":
            boolean = isinstance(value, bool) and argument != "boolean"
            if boolean or not isinstance(value, TYPES[argument]):
                yield f"{where}: {value!r} is no {argument}"
        elif word == "required":
            yield from (f"{where}.{key} is missing" for key in argument if key not in value)
        elif word == "properties":
            yield from (
                fault
                for key, inner in argument.items()
                if isinstance(value, dict) and key in value
                for fault in faults(value[key], inner, f"{where}.{key}")
            )
        elif word == "additionalProperties":
            others = [key for key in value if key not in schema.get("properties", {})] if isinstance(value, dict) else []
            for key in others:
                yield from faults(value[key], argument, where) if argument else [f"{where}.{key} is unknown"]
        elif word in ("items", "prefixItems"):
            items = value if isinstance(value, list) else []
            schemas = argument if word == "prefixItems" else [argument] * len(items)
            yield from (fault for item, inner in zip(items, schemas, strict=False) for fault in faults(item, inner, where))
        elif word == "propertyNames":
            yield from (fault for key in value if isinstance(value, dict) for fault in faults(key, argument, where))
        elif isinstance(value, BOUNDED[word][0]) and not BOUNDED[word][1](value, argument):
            yield f"{where}: {value!r} breaks {word} {argument}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_every_shipped_recipe(path: Path) -> None:
    assert list(faults(yaml.load(path.read_text(), EditorLoader), SCHEMA)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"modle": {"name": "x"}},
        {"model": {"name": ""}},
        {"model": {"dtype": "bfloat16"}},
        {"data": {"train": []}},
        {"data": {"train": [{"pth": "x"}]}},
        {"data": {"train": 5}},
        {"adapter": {"r1": 0}},
        {"adapter": {"method": "lorra"}},
        {"adapter": {"dropout": 1}},
        {"adapter": {"targets": {}}},
        {"adapter": {"rank_pattern": {"q": [1, 2, 3]}}},
        {"training": {"learning_rate": "fast"}},
        {"training": {"batch_size": True}},
        {"training": None},
        {"output": 5},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(change: dict[str, Any]) -> None:
    sound = {"model": {"name": "a/b"}, "data": {"train": "rows.jsonl"}, "output": "out"}
    assert list(faults(sound, SCHEMA)) == []
    assert list(faults(sound | change, SCHEMA))


def test_every_reference_in_the_schema_is_defined() -> None:
    names = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(SCHEMA)))
    assert names == set(SCHEMA["$defs"])
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_abba_schema_prints_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "abba_cli", "schema"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == SCHEMA
