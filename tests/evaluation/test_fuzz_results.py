"""Results files gone wrong: one clear message each."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import answer, evaluation, scored
from mutations import cases, damaged, mutated

from abba_cli.errors import AbbaError
from abba_cli.evaluation.reporting.tables import results_markdown
from abba_cli.evaluation.results import read_results

GOOD: Any = json.loads(
    evaluation(scored("arc_c", 0.5), scored("boolq", 0.7, examples=[answer("yes", "yes", 1.0)])).model_dump_json()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@cases(500)
@given(content=damaged(json.dumps(GOOD).encode()) | st.builds(lambda tree: json.dumps(tree).encode(), mutated(GOOD)))
def test_results_files(content: bytes, folder: Path) -> None:
    (folder / "results.json").write_bytes(content)
    message = "results.json"
    try:
        results_markdown(read_results(folder))
    except AbbaError as error:
        message = str(error)
    assert "results.json" in message
