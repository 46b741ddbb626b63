"""Results, answers and task files gone wrong: one clear message each, never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import run_case
from hypothesis import given
from hypothesis import strategies as st
from made_results import answer, evaluation, scored
from mutations import cases, damaged, mutated

GOOD: Any = json.loads(
    evaluation(scored("arc_c", 0.5), scored("boolq", 0.7, examples=[answer("yes", "yes", 1.0)])).model_dump_json()
)
TASK: Any = {
    "name": "sums",
    "data": {"path": "rows.jsonl", "split": "test"},
    "prompt": "{{ question }}",
    "answer": "{{ answer }}",
    "metric": "number",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@cases(500)
@given(content=damaged(json.dumps(GOOD).encode()) | st.builds(lambda tree: json.dumps(tree).encode(), mutated(GOOD)))
def test_results_files(content: bytes, folder: Path) -> None:
    (folder / "results.json").write_bytes(content)
    code, message = run_case("results", "compare", folder)
    assert code == 0 or str(folder) in message


def test_results_nested_too_deeply(folder: Path) -> None:
    (folder / "results.json").write_text("[" * 100_000)
    assert "results.json is not a results file" in run_case("results", "compare", folder)[1]


@cases(300)
@given(content=damaged(yaml.safe_dump(TASK).encode()) | st.builds(lambda tree: yaml.safe_dump(tree).encode(), mutated(TASK)))
def test_task_files(content: bytes, folder: Path) -> None:
    """The model is not there, which is what is found wrong with a task file that is right."""
    (folder / "task.yaml").write_bytes(content)
    assert run_case("task files", "eval", "--tasks", folder / "task.yaml", "--model", "a/b")[0] == 1
