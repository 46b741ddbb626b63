"""Results of evaluations that never took place, with numbers that are known, and a reader of the tables made of them."""

import io
import itertools
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console

from abba_cli.evaluation.reporting.comparing import Comparison
from abba_cli.evaluation.reporting.side_by_side import comparison_table
from abba_cli.evaluation.results import Difference, Example, ModelRecord, Results, TaskResult, write_results

PARSER = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def scored(task: str, value: float, model: str = "tuned", **fields: Any) -> TaskResult:
    """A task's number; keyword arguments replace fields."""
    known: dict[str, Any] = {
        "task": task,
        "model": model,
        "protocol": "paper",
        "metric": "accuracy",
        "primary": True,
        "value": value,
        "n": 500,
        "stderr": 0.02,
        "interval": (max(0.0, value - 0.04), min(1.0, value + 0.04)),
        "prompt_hash": f"hash-of-{task}",
        "shots": 0,
        "sampling": "greedy",
        "grader": "abba",
        "extraction_failures": 0,
        "unmarked": None,
        "disagreements": 0,
        "unreadable_rows": 0,
        "data": "local",
        "difference": None,
        "examples": (),
    }
    return TaskResult(**{**known, **fields})


def beside(baseline: float, value: float, p_value: float = 0.0123) -> Difference:
    return Difference(baseline=baseline, difference=value - baseline, p_value=p_value, test="McNemar exact", n=500)


def answer(response: str, prediction: str | None, score: float) -> Example:
    return Example(prompt="Is it so?", response=response, prediction=prediction, gold="true", score=score)


def model(label: str = "tuned", role: str = "model", **fields: Any) -> ModelRecord:
    known: dict[str, Any] = {
        "label": label,
        "role": role,
        "base": None,
        "adapter": None,
        "fingerprint": f"weights-of-{label}",
        "template": "alpaca",
        "dtype": "float32",
        "quantization": "none",
    }
    return ModelRecord(**{**known, **fields})


def evaluation(*results: TaskResult, models: tuple[ModelRecord, ...] | None = None) -> Results:
    """All of results.json; the models that are not given are named by the results."""
    models = models or tuple(model(label) for label in dict.fromkeys(one.model for one in results))
    return Results(abba="1.2.3", created="2026-11-22T10:00:00+00:00", seconds=60.0, settings={}, models=models, results=results)


def written(folder: Path, results: Results) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, results)
    return folder


def cells_of(markdown: str) -> list[list[str]]:
    """The text of every cell of the only table."""
    rows: list[list[str]] = []
    tokens = PARSER.parse(markdown)
    assert sum(token.type == "table_open" for token in tokens) == 1
    for token, content in itertools.pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            assert not {child.type for child in content.children or []} - {"text", "text_special", "strong_open", "strong_close"}
            rows[-1].append("".join(child.content for child in content.children or []))
    return rows


def drawn_comparison(comparison: Comparison, width: int) -> str:
    """What a terminal shows; nothing may be cut or leave it."""
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(comparison, width))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    return text
