"""From the rows of a task to what the model is asked: the prompt's tokens and the right answer of each row."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.judging import gold_of
from abba_cli.evaluation.rows import TaskRows, read_rows
from abba_cli.evaluation.tasks import Task
from abba_cli.formats import Example, Message, Row, compile_template
from abba_cli.prompts import Template, encode_prompt


@dataclass(frozen=True)
class Item:
    """One row of a task, ready for any model.

    Args:
        number: Its place among the readable rows, from 0.
        row: The source's own columns.
        asked: The task's prompt.
        continued: The text to continue, for models without a prompt template; None where the task has no such form.
        answer: The right answer, as the source has it.
        gold: What of it is compared: the number after ####, the formula in the box.
    """

    number: int
    row: Row
    asked: str
    continued: str | None
    answer: str
    gold: str


@dataclass(frozen=True)
class TaskItems:
    """The rows of a task that are to be scored, and its worked examples.

    Args:
        task: The task.
        source: Where the rows came from.
        items: Those to be scored, in the source's order.
        shots: Prompt and answer of each worked example.
        unreadable: One line about each row that could not be read.
    """

    task: Task
    source: str
    items: Sequence[Item]
    shots: Sequence[tuple[str, str]]
    unreadable: Sequence[str]


@dataclass(frozen=True)
class Question:
    """What a model is given for one row.

    Args:
        item: The row.
        text: The prompt in full.
        ids: Its tokens.
        stop: Texts that end the answer.
    """

    item: Item
    text: str
    ids: tuple[int, ...]
    stop: tuple[str, ...]


def read_items(
    task: Task, *, split: str | None = None, data_dir: Path | None = None, limit: int | None = None, shots: int = 0, seed: int = 0
) -> TaskItems:
    """Read what a task asks.

    Args:
        task: The task.
        split: In place of the task's own.
        data_dir: Folder of local data.
        limit: Only the first so many rows.
        shots: Worked examples, drawn from the task's split for them.
        seed: Of that draw.

    Raises:
        DataError: The rows cannot be had, none can be read, or there are too few for the worked examples.
    """
    found = read_rows(task, split, data_dir)
    items, unreadable = _items(task, found, limit)
    if not items:
        raise DataError(f"task {task.name}: no row can be read; the first: {unreadable[0]}")
    return TaskItems(task, found.source, items, _draw_shots(task, shots, seed, data_dir), unreadable)


def ask(items: TaskItems, template: Template, paper: bool = False) -> list[Question]:
    """Lay the rows of a task out for a model.

    Args:
        items: The rows.
        template: The model's prompt template; holds the tokenizer.
        paper: The template is Alpaca's, and the paper's ending comes after it.

    Raises:
        DataError: The template refuses a conversation.
    """
    task = items.task
    plain = template.name == "none"
    earlier = [message for asked, said in items.shots for message in (Message("user", asked), Message("assistant", said))]
    questions = []
    for item in items.items:
        continued = plain and item.continued is not None and not earlier
        if continued:
            assert item.continued is not None
            text = item.continued
        else:
            text = template.prompt_text(Example((*earlier, Message("user", item.asked))))
        text += task.paper_ending if paper else ""
        stop = task.completion_stop if continued else task.stop
        questions.append(Question(item, text, tuple(encode_prompt(text, template.tokenizer)), stop))
    return questions


def prompt_hash(questions: Sequence[Question]) -> str:
    """Digest of every prompt in order, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps([question.text for question in questions]).encode()).hexdigest()[:12]


def _items(task: Task, found: TaskRows, limit: int | None) -> tuple[list[Item], list[str]]:
    what = f"the {{}} of task {task.name}"
    prompt = compile_template(task.prompt, what.format("prompt"))
    answer = compile_template(task.answer, what.format("answer"))
    completion = compile_template(task.completion, what.format("completion")) if task.completion else None
    items: list[Item] = []
    unreadable = list(found.unreadable)
    for place, row in found.rows:
        if limit is not None and len(items) == limit:
            break
        # A column that holds nothing is not there: it must not be asked as the word None.
        row = {column: value for column, value in row.items() if value is not None}
        try:
            asked, right = prompt(row), answer(row)
            if not asked.strip():
                raise DataError("the prompt is empty")
            continued = completion(row) if completion else None
            items.append(Item(len(items), row, asked, continued, right, gold_of(task, right)))
        except DataError as error:
            # The templates stand in the task file; a line about a row has no room for them.
            text = str(error).replace(f" {task.prompt!r}", "").replace(f" {task.answer!r}", "")
            unreadable.append(f"{place}: {text}")
    return items, unreadable


def _draw_shots(task: Task, shots: int, seed: int, data_dir: Path | None) -> list[tuple[str, str]]:
    if not shots:
        return []
    if task.reference is None or task.data.shots_split is None:
        raise DataError(f"task {task.name} has no worked examples; leave --shots out")
    found = read_rows(task, task.data.shots_split, data_dir)
    items, _ = _items(task, found, None)
    if len(items) < shots:
        raise DataError(f"task {task.name}: {found.source} has {len(items)} rows for worked examples, --shots asks for {shots}")
    reference = compile_template(task.reference, f"the reference of task {task.name}")
    drawn = random.Random(seed).sample(items, shots)
    return [(item.asked, reference({**item.row, "gold": item.gold})) for item in drawn]
