"""The schema: what a recipe accepts, and that nobody can change one after reading."""

from typing import Any

import pytest
from pydantic import ValidationError

from abba_cli.recipe import Recipe


def recipe(**sections: Any) -> Recipe:
    plain: dict[str, Any] = {"model": {"name": "a/b"}, "data": {"train": "rows.jsonl"}, "output": "out"}
    for name, keys in sections.items():
        plain[name] = {**plain.get(name, {}), **keys}
    return Recipe.model_validate(plain)


def test_three_keys_make_a_recipe() -> None:
    assert recipe().adapter.method == "abba"


@pytest.mark.parametrize(
    ("written", "number"), [("1e-3", 0.001), ("2e-5", 0.00002), ("1E-4", 0.0001), (".5", 0.5), (1, 1.0), ("3", 3.0)]
)
def test_learning_rates_are_floats_however_yaml_reads_them(written: str | float, number: float) -> None:
    rate = recipe(training={"learning_rate": written}).training.learning_rate
    assert (type(rate), rate) == (float, number)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("adapter", {"r1": 0}),
        ("adapter", {"r2": 1.5}),
        ("adapter", {"alpha": 0}),
        ("adapter", {"alpha": float("inf")}),
        ("adapter", {"dropout": 1.0}),
        ("adapter", {"dropout": -0.1}),
        ("adapter", {"targets": []}),
        ("adapter", {"targets": ""}),
        ("adapter", {"targets": "("}),
        ("adapter", {"exclude": "*"}),
        ("adapter", {"layers": [-1]}),
        ("adapter", {"rank_pattern": {"q_proj": [8]}}),
        ("adapter", {"rank_pattern": {"q_proj": [8, 0]}}),
        ("adapter", {"rank_pattern": {"(": 8}}),
        ("adapter", {"alpha_pattern": {"q_proj": 0}}),
        ("adapter", {"start_from": ""}),
        ("model", {"name": ""}),
        ("model", {"dtype": "fp16"}),
        ("data", {"train": []}),
        ("data", {"train": [{"path": ""}]}),
        ("data", {"train": [{"path": "x", "weight": 0}]}),
        ("data", {"train": [{"path": "x", "prompt": "p"}]}),
        ("data", {"max_length_tokens": 7}),
        ("training", {"learning_rate": True}),
        ("training", {"learning_rate": float("nan")}),
        ("training", {"batch_size": True}),
        ("training", {"max_steps": 0}),
        ("training", {"epochs": 0}),
        ("training", {"seed": -1}),
        ("evaluation", {"every_steps": 5}),
        ("evaluation", {"samples": 1}),
        ("checkpoints", {"keep": 0}),
        ("logging", {"logger": "mlflow"}),
        ("training", {"lr": 1}),
    ],
)
def test_values_out_of_bounds_are_refused(section: str, keys: dict[str, Any]) -> None:
    recipe()
    with pytest.raises(ValidationError):
        recipe(**{section: keys})


def test_patience_needs_evaluations_to_count() -> None:
    with pytest.raises(ValidationError, match=r"set evaluation\.every_steps"):
        recipe(data={"eval": "held-out.jsonl"}, evaluation={"patience": 2})
    assert recipe(data={"eval": "held-out.jsonl"}, evaluation={"patience": 2, "every_steps": 9}).evaluation.patience == 2


def test_packed_rows_have_no_length_to_group_by() -> None:
    with pytest.raises(ValidationError, match=r"data\.packing leaves no padding that training\.group_by_length could save"):
        recipe(data={"packing": True}, training={"group_by_length": True})
    assert recipe(data={"packing": False}, training={"group_by_length": True}).training.group_by_length


@pytest.mark.parametrize(
    "written", ["rows.jsonl", ["rows.jsonl"], {"path": "rows.jsonl"}, [{"path": "rows.jsonl", "split": "train"}]]
)
def test_a_single_source_may_be_written_in_short(written: Any) -> None:
    assert recipe(data={"train": written}) == recipe()


@pytest.mark.parametrize("targets", ["all-linear", r".*\.mlp\..*", ["q_proj"]])
def test_targets_are_names_or_one_regex(targets: str | list[str]) -> None:
    assert recipe(adapter={"targets": targets}).adapter.targets == targets


def test_a_pattern_gives_one_rank_or_two() -> None:
    patterns = recipe(adapter={"rank_pattern": {"q_proj": 8, r"layers\.0\..*": [4, 28]}}).adapter.rank_pattern
    assert patterns == {"q_proj": 8, r"layers\.0\..*": (4, 28)}


def test_a_revision_of_digits_is_text() -> None:
    assert recipe(model={"revision": 1234567}).model.revision == "1234567"


def test_recipes_are_frozen_on_every_level() -> None:
    frozen = recipe()
    for section, key in ((frozen, "output"), (frozen.training, "seed"), (frozen.data.train[0], "path")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, "x")


def test_recipes_share_no_default_that_could_be_changed() -> None:
    first, second = recipe(), recipe()
    assert isinstance(first.adapter.targets, list)
    first.adapter.targets.append("lm_head")
    assert "lm_head" not in second.adapter.targets
    assert "lm_head" not in recipe().adapter.targets
