"""docs/evaluation-reference.md, from the schemas of task files and results.json and from the built-in tasks.

`python -m abba_cli.evaluation.reference` writes the page; `--check` only tells whether it is out of date.
"""

import json
import sys
from collections.abc import Iterator

from pydantic import BaseModel

from abba_cli.evaluation.results import Difference, Example, ModelRecord, Results, TaskResult
from abba_cli.evaluation.tasks import PaperSampling, Task, TaskData, built_in
from abba_cli.recipe_reference import ROOT, accepted

_INTRODUCTION = """\
# Evaluation reference

<!-- Generated from abba_cli/evaluation/ by `make docs`; change it there. -->

What `abba eval` reads and writes, key by key. How to use it: [evaluation.md](evaluation.md).

## Built-in tasks

| task | group | rows | what it asks | judged by | longest answer, tokens | source | other names |
|---|---|---|---|---|---|---|---|"""


def main(*arguments: str) -> str | None:
    """Write the page, or with `--check` only return whether it is out of date."""
    page = ROOT / "docs" / "evaluation-reference.md"
    text = "\n".join(_lines()) + "\n"
    if page.is_file() and page.read_text(encoding="utf-8") == text:
        return None
    if "--check" in arguments:
        return f"docs/{page.name} is out of date; run `make docs`"
    page.write_text(text, encoding="utf-8")
    return None


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    for task in built_in().values():
        source = f"{task.data.path}, {task.data.split}"
        cells = [
            task.name,
            task.group,
            f"{task.rows:,}",
            task.title,
            task.metric,
            task.max_tokens,
            source,
            ", ".join(task.aliases),
        ]
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"
    yield from _keys("Task files", Task, "")
    yield from _keys("Task files: `data`", TaskData, "data.")
    yield from _keys("Task files: `paper_sampling`", PaperSampling, "paper_sampling.")
    yield from _keys("results.json", Results, "")
    yield from _keys("results.json: each of `models`", ModelRecord, "")
    yield from _keys("results.json: each of `results`", TaskResult, "")
    yield from _keys("results.json: `difference`", Difference, "")
    yield from _keys("results.json: each of `examples`", Example, "")


def _keys(title: str, section: type[BaseModel], prefix: str) -> Iterator[str]:
    yield f"\n## {title}\n\n| key | holds | default | meaning |\n|---|---|---|---|"
    schema = section.model_json_schema()
    for name, key in schema["properties"].items():
        default = (
            f"`{json.dumps(key['default'])}`" if "default" in key else "required" if name in schema.get("required", ()) else ""
        )
        yield f"| `{prefix}{name}` | {_holds(key)} | {default} | {key.get('description', '')} |"


def _holds(key: dict[str, object]) -> str:
    branches = key.get("anyOf")
    inner = [one for one in branches if "$ref" in one] if isinstance(branches, list) else []
    if "$ref" in key or inner:
        return "a section of keys" + (" or null" if inner else "")
    return accepted(key)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
