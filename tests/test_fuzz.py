"""Bad recipes, overrides, data and templates end in one clear message, never in a traceback. `make fuzz` runs many more cases."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation.harness_rows import write_tokenizer
from fuzzing import run_case
from hypothesis import example, given
from hypothesis import strategies as st
from models import write_model
from mutations import ODD, VALUES, cases, damaged, mutated

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
FRAGMENTS = [
    *(
        "{{ prompt }}",
        "{{ messages[0].content }}",
        "{{ messages[9] }}",
        "{{ input.x.y }}",
        "{{ turn / turn }}",
        "{{ prompt * turn }}",
    ),
    *("{% if input %}", "{% else %}", "{% endif %}", "{% for m in messages %}", "{% for i in range(10**6) %}", "{% endfor %}"),
    *("{% set x = 1 %}", "{% macro f() %}", "{{ f() }}", "{% endmacro %}", "{% include 'x' %}", "{% extends 'x' %}", "{% raw %}"),
    *(
        "{{ prompt.__class__ }}",
        "{{ prompt|int(base=99) }}",
        "{{ '%d' % prompt }}",
        "{{ cycler() }}",
        "{# ",
        " #}",
        "{{",
        "}}",
        "\n",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", autouse=True)
def elsewhere(folder: Path) -> Any:
    """What a recipe names without a path is looked for here."""
    with contextlib.chdir(folder):
        yield


@pytest.fixture(scope="module")
def small(folder: Path) -> dict[str, Any]:
    """A recipe that works, but for one setting: found out after the data is read, before the forecast."""
    model = write_model(folder / "model", write_tokenizer(folder / "tokenizer"), max_position_embeddings=8)
    (folder / "good.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": {"r1": 2, "r2": 2},
        "data": {"train": "good.jsonl", "template": "alpaca"},
        "training": {"max_steps": 1},
        "output": "out/small",
    }


def dry_run(kind: str, recipe: Any, folder: Path, *overrides: str) -> tuple[int, str]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return run_case(kind, "train", file, "--dry-run", *(part for one in overrides for part in ("--set", one)))


def test_the_small_recipe_is_read_to_its_data(small: dict[str, Any], folder: Path) -> None:
    """Without this, every case below could end at the same first error."""
    code, message = dry_run("data", small, folder)
    assert code == 1
    assert "the model has 8 positions" in message
    assert dry_run("recipes", small, folder, "data.max_length_tokens=8", "data.supervise=all")[0] == 0
    assert not (folder / "out").exists()


NINES = b"a: &a [x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghi")
DEEP = {"brackets": b"[" * 100_000, "dashes": b"- " * 50_000, "itself": b"a: &a {b: *a}", "aliases of aliases": NINES}
DEEP |= {
    "a date": b"a: 2024-99-99",
    "digits": b"a: " + b"9" * 5000,
    "a tag": b"a: !!timestamp x",
    "a zero byte": b'output: "\\0"',
}


@pytest.mark.parametrize("name", DEEP)
def test_yaml_that_takes_all(name: str, folder: Path) -> None:
    file = folder / "deep.yaml"
    file.write_bytes(DEEP[name])
    assert run_case("recipes", "train", file, "--dry-run")[1].startswith(f"abba: {file}: not valid YAML: ")
    if name != "a tag":
        value = DEEP[name].partition(b": ")[2].decode() or DEEP[name].decode()
        assert run_case("overrides", "train", folder / "recipe.yaml", "--set", f"model.name={value}")[0] == 1
    assert run_case("task files", "eval", "--tasks", file, "--model", "a/b")[1].startswith(f"abba: {file}: not valid YAML: ")


@pytest.mark.parametrize("content", ["[" * 100_000, "[" + "9" * 5000 + "]", '{"a": ' * 50_000])
def test_json_that_takes_all(content: str, small: dict[str, Any], folder: Path) -> None:
    file = folder / "deep.json"
    file.write_text(content)
    assert ":1: not valid JSON" in dry_run("data", small, folder, f"data.train={file}")[1]


@cases(1500)
@given(tree=mutated(RECIPE))
def test_recipes(tree: Any, folder: Path) -> None:
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
        dry_run("recipes", tree, folder)


@cases(60)
@given(data=st.data())
def test_recipes_of_a_model_that_is_there(data: st.DataObject, small: dict[str, Any], folder: Path) -> None:
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
        dry_run("recipes", data.draw(mutated(small)), folder)


@cases(500)
@given(content=damaged(yaml.safe_dump(RECIPE).encode()) | st.binary(max_size=60))
def test_recipe_files(content: bytes, folder: Path) -> None:
    file = folder / "damaged.yaml"
    file.write_bytes(content)
    run_case("recipes", "train", file, "--dry-run")


@cases(1700)
@given(overrides=st.lists(st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(KEYS), ODD | VALUES), max_size=3))
def test_overrides(overrides: list[str], folder: Path) -> None:
    dry_run("overrides", RECIPE, folder, *overrides)


@cases(200)
@given(rows=st.lists(mutated(ROWS[0]) | VALUES, max_size=3), suffix=st.sampled_from([".jsonl", ".json", ".yaml"]))
@example(rows=[{"question": "\ud800", "answer": "\ud800"}], suffix=".jsonl")
def test_rows_of_data(rows: list[Any], suffix: str, small: dict[str, Any], folder: Path) -> None:
    file = folder / f"rows{suffix}"
    lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    dry_run("data", small, folder, f"data.train={file}")


@cases(250)
@given(
    content=damaged("\n".join(map(json.dumps, ROWS)).encode()) | damaged(b"question,answer\n1+1,2\n2+2,4\n"),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz", ".arrow"]),
)
@example(content=b'question,answer\n"' + b"x" * 200_000 + b'",2\n', suffix=".csv")
@example(content=b"\x1f\x8b\x08\x00" + b"\x00" * 30, suffix=".jsonl.gz")
def test_data_files(content: bytes, suffix: str, small: dict[str, Any], folder: Path) -> None:
    file = folder / f"file{suffix}"
    file.write_bytes(content)
    dry_run("data", small, folder, f"data.train={file}")


@cases(150)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=8))
def test_templates(fragments: list[str], small: dict[str, Any], folder: Path) -> None:
    file = folder / "template.jinja"
    file.write_text("".join(fragments), encoding="utf-8")
    dry_run("templates", small, folder, f"data.template={file}")
