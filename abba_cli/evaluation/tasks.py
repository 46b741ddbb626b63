"""What a task is: where its rows come from, what is asked, and how an answer is judged. One YAML file each."""

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from abba_cli.errors import DataError
from abba_cli.plain_yaml import parse_yaml
from abba_cli.recipe_section import Regex, Section, Text

GROUPS = {
    # The order of the paper's table 1.
    "commonsense": ("obqa", "arc_c", "arc_e", "winogrande", "hellaswag", "piqa", "siqa", "boolq"),
    "arithmetic": ("gsm8k", "math", "math500"),
    "code": ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus"),
}
CODE_METRICS = GROUPS["code"]
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv")
_FOLDER = Path(__file__).parent / "benchmarks"

Metric = Literal["choice", "exact", "number", "latex", "humaneval", "humaneval_plus", "mbpp", "mbpp_plus"]
Rows = Annotated[tuple[int, int], Field(description="First row and the row after the last, from 0.")]


class TaskData(Section):
    """Where the rows of a task come from."""

    path: Text = Field(description="Hub id, or a local file or directory (json, jsonl, csv, parquet) from the task file on.")
    subset: Text | tuple[Text, ...] | None = Field(None, description="Configuration of a hub data set; several are joined.")
    split: Text = Field("test", description="Split that is scored.")
    shots_split: Text | None = Field("train", description="Split that worked examples are drawn from; null for none.")
    folders: tuple[Text, ...] = Field((), description="Names of its folder under `--data-dir`.")
    file: Text | None = Field(None, description="Name of a file in that folder that holds every split.")
    ranges: dict[str, Rows] | None = Field(None, description="Where in that file each split lies.")


class PaperSampling(Section):
    """Settings of the draws in the paper's released code."""

    temperature: float = Field(gt=0, description="Of the draws.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens of this probability together.")
    top_k: int = Field(0, ge=0, description="Draw from this many of the likeliest tokens; 0 is all.")


class Task(Section):
    """One benchmark. Templates are Jinja over the columns of a row."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$")] = Field(description="Name for `--tasks` and in tables.")
    aliases: tuple[Text, ...] = Field((), description="Other names that are understood.")
    group: Text | None = Field(None, description="The group that it belongs to.")
    title: str = Field("", description="What it asks, in a few words.")
    rows: int | None = Field(None, ge=1, description="Rows of its split, for `abba eval --list`.")
    data: TaskData = Field(description="Where its rows come from.")
    prompt: Text = Field(description="Template of what is asked; the run's prompt template goes around it.")
    completion: Text | None = Field(
        None, description="Template of a text to continue, in place of `prompt` where the prompt template is none."
    )
    completion_stop: tuple[Text, ...] = Field((), description="Texts that end a continued text.")
    answer: Text = Field(description="Template of the right answer, as the source has it.")
    reference: Text | None = Field(
        None, description="Template of a whole answer, for worked examples; `gold` is the right answer. Null: no examples."
    )
    metric: Metric = Field(description="How an answer is judged.")
    choices: tuple[Text, ...] = Field((), description="For `choice`: the first of these words in the answer counts.")
    pattern: Regex | None = Field(
        None, description="Regular expression of the answer (its group 1, if there is one); the last match counts."
    )
    max_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
    stop: tuple[Text, ...] = Field((), description="Texts that end an answer.")
    paper_ending: str = Field("", description="What `--prompt paper` writes after `### Response:`.")
    paper_sampling: PaperSampling | None = Field(None, description="Draws of `--sampling paper`; null is greedy there, too.")

    @model_validator(mode="after")
    def _choices_go_with_choice(self) -> "Task":
        if (self.metric == "choice") != bool(self.choices):
            raise ValueError("choices and the metric `choice` go together")
        if self.pattern is not None and self.metric not in ("exact", "number", "latex"):
            raise ValueError("pattern goes with the metrics exact, number and latex")
        if self.metric == "exact" and self.pattern is None:
            raise ValueError("pattern is missing: the metric exact compares what it finds")
        return self

    @property
    def runs_code(self) -> bool:
        """Whether scoring executes what the model has written."""
        return self.metric in CODE_METRICS


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that `--tasks` names.

    Args:
        names: Names, aliases, groups, or paths of task files; repeated ones count once.

    Raises:
        DataError: A name is unknown (the message has the nearest), or a task file has holes.
    """
    found: dict[str, Task] = {}
    for name in names:
        if name.endswith((".yaml", ".yml")):
            tasks = [read_task(Path(name).expanduser())]
        else:
            tasks = [built_in()[one] for one in GROUPS.get(name.lower()) or (canonical_name(name),)]
        for task in tasks:
            if found.setdefault(task.name, task) != task:
                raise DataError(f"two tasks are called {task.name}; give the one in your task file another name")
    if not found:
        raise DataError("no task is named; `abba eval --list` shows them")
    return list(found.values())


def canonical_name(name: str) -> str:
    """The name of a built-in task, from any of its names.

    Raises:
        DataError: There is none.
    """
    names = {alias.casefold(): task.name for task in built_in().values() for alias in (task.name, *task.aliases)}
    if name.casefold() in names:
        return names[name.casefold()]
    close = difflib.get_close_matches(name.casefold(), [*names, *GROUPS], n=1, cutoff=0.5)
    hint = f"did you mean {names.get(close[0], close[0])}? " if close else ""
    raise DataError(f"there is no task {name}; {hint}`abba eval --list` shows them; a task of your own is a .yaml file")


@cache
def built_in() -> dict[str, Task]:
    """The tasks that come with abba, by name, in the order of their groups."""
    return {name: read_task(_FOLDER / f"{name}.yaml") for group in GROUPS.values() for name in group}


def read_task(path: Path) -> Task:
    """Read a task file; a local data path in it starts at its folder.

    Raises:
        DataError: It cannot be read, or has keys that are missing, unknown or wrong; one message tells all of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = parse_yaml(text)[1]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the task file {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise DataError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path} is no task file; expected the keys name, data, prompt, answer and metric")
    try:
        task = Task.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(item, tree, text, path) for item in error.errors()]
        head = [f"{path} has {len(problems)} problems:"] if len(problems) > 1 else []
        raise DataError("\n  ".join([*head, *problems])) from None
    local = path.parent / Path(task.data.path).expanduser()
    if local.exists() or task.data.path.startswith((".", "/", "~")) or task.data.path.endswith(SUFFIXES):
        task = task.model_copy(update={"data": task.data.model_copy(update={"path": str(local)})})
    return task


def _problem(item: Any, tree: dict[str, Any], text: str, path: Path) -> str:
    """One line about one key: where it stands, what is wrong, what was expected."""
    where = [str(part) for part in item["loc"]]
    key = ".".join(where)
    section = TaskData if where[:1] == ["data"] and len(where) > 1 else Task
    fields = section.model_fields
    last = where[-1] if where else ""
    lines = [number for number, line in enumerate(text.splitlines(), start=1) if line.lstrip().startswith(f"{last}:")]
    place = f"{path}:{lines[0]}" if last and lines else str(path)
    if item["type"] == "missing":
        meaning = fields[last].description if last in fields else ""
        return f"{place}: {key} is missing. {meaning}".rstrip()
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(last, list(fields), n=1)
        return f"{place}: unknown key {key}; " + (
            f"did you mean {close[0]}?" if close else f"expected one of {', '.join(fields)}"
        )
    if item["type"] == "value_error":
        return f"{place}: {key + ': ' if key else ''}{item['ctx']['error']}"
    return f"{place}: {key} is {str(item['input'])[:60]!r}: {item['msg']}"
