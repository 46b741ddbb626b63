"""From a sweep file to its runs: which, in what order, with which recipe, and known again wherever the data lies."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from abba_cli.errors import DataError, RecipeError
from abba_cli.sweeping.planning import Sweep, load_sweep

RecipeFile = Callable[..., Path]


@pytest.fixture
def sweep_file(recipe_file: RecipeFile, tmp_path: Path) -> Callable[..., Path]:
    def write(**keys: str) -> Path:
        recipe_file()
        parts = {"base": "recipe.yaml", "output": str(tmp_path / "out"), "variants": "{a: {}, b: {set: {adapter.r1: 5}}}"} | keys
        file = tmp_path / "sweep.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in parts.items() if value))
        return file

    return write


SweepFile = Callable[..., Path]


def runs(sweep: Sweep) -> list[tuple[str, int, int | None, float]]:
    made = sweep.runs({point.label: {} for point in sweep.points})
    return [(run.name, run.recipe.training.seed, run.recipe.adapter.r1, run.recipe.training.learning_rate) for run in made]


def test_variants_times_grid_times_seeds(sweep_file: SweepFile) -> None:
    sweep = load_sweep(sweep_file(grid="{training.learning_rate: [1e-3, 5e-5]}", seeds="[7, 3]"))
    assert [point.label for point in sweep.points] == [
        *("a learning_rate=0.001", "a learning_rate=5e-05", "b learning_rate=0.001", "b learning_rate=5e-05"),
    ]
    assert runs(sweep) == [
        (f"runs/{name}-learning_rate-{rate}/seed-{seed}", seed, r1, float(rate))
        for seed in (7, 3)
        for name, r1 in (("a", 4), ("b", 5))
        for rate in ("0.001", "5e-05")
    ]
    assert len({run.digest for run in sweep.runs({point.label: {} for point in sweep.points})}) == 8


def test_which_value_of_a_key_holds(sweep_file: SweepFile) -> None:
    file = sweep_file(
        set="{adapter: {r1: 2, r2: 2}, training.max_steps: 3}",
        variants="{a: {set: {adapter.r2: 6, training.max_steps: 4}}}",
        grid="{training.max_steps: [5]}",
        tune="{values: {training.learning_rate: [0.5, 0.25]}, set: {training.max_steps: 1}}",
    )
    sweep = load_sweep(file, ["adapter.alpha=3"])
    first, second = sweep.tuning_runs()
    assert (first.recipe.training.max_steps, first.recipe.training.learning_rate) == (1, 0.5)
    assert second.name == "tuning/a-max_steps-5/learning_rate-0.25"
    [run] = sweep.runs({"a max_steps=5": {"training.learning_rate": 0.25}})
    assert (run.recipe.adapter.r1, run.recipe.adapter.r2, run.recipe.adapter.alpha) == (2, 6, 3.0)
    assert (run.recipe.training.max_steps, run.recipe.training.learning_rate) == (5, 0.25)
    assert Path(run.recipe.output) == sweep.output / run.name


def test_a_variant_may_tune_other_values(sweep_file: SweepFile) -> None:
    file = sweep_file(
        variants="{a: {}, b: {tune: {training.learning_rate: [3, 2, 1]}}}",
        tune="{values: {training.learning_rate: [0.5]}, seed: 9}",
    )
    tried = [(run.name, run.seed, run.recipe.training.seed) for run in load_sweep(file).tuning_runs()]
    assert tried == [
        ("tuning/a/learning_rate-0.5", 9, 9),
        *((f"tuning/b/learning_rate-{rate}", 9, 9) for rate in (3, 2, 1)),
    ]


def test_a_run_is_known_again_wherever_its_data_lies(sweep_file: SweepFile, rows: Path, tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        shutil.copy(rows, tmp_path / name / "rows.jsonl")
    file = sweep_file(set='{data.train: "{data_dir}/rows.jsonl"}', data_dir=str(tmp_path / "here"))
    here, there = load_sweep(file), load_sweep(file, data_dir=tmp_path / "there", output=tmp_path / "elsewhere")
    first, second = ([run.digest for run in one.runs({"a": {}, "b": {}})] for one in (here, there))
    assert first == second
    assert there.runs({"a": {}})[0].recipe.data.train[0].path == str(tmp_path / "there" / "rows.jsonl")
    (tmp_path / "there" / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert first[0] != there.runs({"a": {}})[0].digest
    other = load_sweep(
        sweep_file(set='{data.train: "{data_dir}/rows.jsonl"}', evaluate="{tasks: [obqa]}"), data_dir=tmp_path / "here"
    )
    assert first[0] != other.runs({"a": {}})[0].digest


def test_data_that_is_not_there(sweep_file: SweepFile, tmp_path: Path) -> None:
    file = sweep_file(set='{data.train: "{data_dir}/rows.jsonl"}', data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere/rows\.jsonl does not exist; data_dir is .*nowhere, another folder is given by"):
        runs(load_sweep(file))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variants": ""}, "it varies nothing: give variants, or a grid"),
        ({"seeds": "[1, 1]"}, "a seed stands twice in seeds"),
        ({"seeds": "[]"}, "seeds: list should have at least 1 item"),
        ({"reference": "c"}, "reference 'c' is no variant; expected one of a, b"),
        ({"varients": "{a: {}}"}, "unknown key varients; expected base, output, data_dir, set, seeds, variants"),
        ({"base": ""}, "base is missing: The recipe, relative to this file."),
        ({"base": "none.yaml"}, "none.yaml: No such file or directory"),
        ({"variants": "{a: {tune: {training.learning_rate: [1]}}}"}, "there is no tune section"),
        ({"variants": "{a: {set: {adapter.r9: 1}}}"}, "a: --set adapter.r9=1: unknown key adapter.r9; expected one of method"),
        ({"set": '{data.train: "{data_dir}/rows.jsonl"}'}, "needs a folder of data for {data_dir}: give --data-dir"),
        ({"hours": "0"}, "hours: input should be greater than 0, found 0"),
    ],
)
def test_what_is_wrong_is_said(keys: dict[str, str], message: str, sweep_file: SweepFile) -> None:
    with pytest.raises(RecipeError) as error:
        runs(load_sweep(sweep_file(**keys)))
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("", "holds no keys"), ("- 1", "holds no keys")])
def test_what_is_no_sweep(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_sweep(file)
    with pytest.raises(RecipeError, match=r"cannot read the sweep .*No such file"):
        load_sweep(tmp_path / "nothing.yaml")
