"""Tasks as data: the built-in ones, their names, the wording of their prompts, and task files with holes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from abba_cli.errors import DataError
from abba_cli.evaluation.questions import read_items
from abba_cli.evaluation.tasks import GROUPS, built_in, canonical_name, find_tasks, read_task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

# Rows as the hub's data sets have them, and what LLM-Adapters' files make of them.
CANONICAL: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": (
        {"question": "is house tax and property tax are same", "answer": True, "passage": "Property tax or 'house tax' ..."},
        "Please answer the following question with true or false, question: is house tax and property tax are same?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "dresser", "sol1": "replace drawer with bobby pin", "sol2": "finish, woodgrain with bobby pin", "label": 1},
        "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with bobby pin\n\n"
        "Solution2: finish, woodgrain with bobby pin\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {"context": "Sydney walked past.", "question": "How?", "answerA": "a", "answerB": "b b", "answerC": "c", "label": "3"},
        "Please choose the correct answer to the question: Sydney walked past. How?\n\nAnswer1: a Answer2: b b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {
            "activity_label": "Playing drums",
            "ctx_a": "People are standing behind large drums.",
            "ctx_b": "a man",
            "endings": ["plays.", "sings.", "runs.", "begins playing the drums."],
            "label": "3",
        },
        "Please choose the correct ending to complete the given sentence: Playing drums: People are standing behind large "
        "drums. A man\n\nEnding1: plays. Ending2: sings. Ending3: runs. Ending4: begins playing the drums.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    "winogrande": (
        {"sentence": "Sarah was better than Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was better than Maria so _ "
        "won.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2",
        "option1",
    ),
    "arc_e": (
        {"question": "Which?", "choices": {"text": ["x", "y y", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        "Please choose the correct answer to the question: Which?\n\nAnswer1: x Answer2: y y Answer3: z\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "arc_c": (
        {"question": "Which?", "choices": {"text": list("vwxyz"), "label": list("12345")}, "answerKey": "5"},
        "Please choose the correct answer to the question: Which?\n\nAnswer1: v Answer2: w Answer3: x Answer4: y Answer5: z\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    "obqa": (
        {"question_stem": "Predators eat", "choices": {"text": list("abcd"), "label": list("ABCD")}, "answerKey": "C"},
        "Please choose the correct answer to the question: Predators eat\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer3",
    ),
}


def write_rows(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_built_in_task_is_in_a_group_and_says_what_it_is() -> None:
    assert [name for group in GROUPS.values() for name in group] == list(built_in())
    for name, task in built_in().items():
        assert name in GROUPS[str(task.group)]
        assert task.rows
        assert task.title


@pytest.mark.parametrize("name", CANONICAL)
def test_rows_of_the_hub_are_asked_in_the_wording_of_llm_adapters(name: str, tmp_path: Path) -> None:
    row, prompt, gold = CANONICAL[name]
    write_rows(tmp_path / name / "test.jsonl", row)
    [item] = read_items(built_in()[name], data_dir=tmp_path).items
    assert (item.asked, item.gold) == (prompt, gold)


@pytest.mark.parametrize("name", CANONICAL)
def test_rows_that_carry_the_wording_are_asked_as_they_are(name: str, tmp_path: Path) -> None:
    gold = built_in()[name].choices[1]
    row = {"instruction": " Odd  wording? ", "input": "", "output": f"the correct answer is {gold}", "answer": gold}
    folder = built_in()[name].data.folders[0]
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "test.json").write_text(json.dumps([row]))
    [item] = read_items(built_in()[name], data_dir=tmp_path).items
    assert (item.asked, item.gold) == (" Odd  wording? ", gold)


def test_boolq_in_the_columns_of_super_glue(tmp_path: Path) -> None:
    """As the harness reads it: `label` in place of `answer`."""
    write_rows(tmp_path / "boolq" / "validation.jsonl", *({"passage": "p", "question": "q", "label": label} for label in (0, 1)))
    assert [item.gold for item in read_items(built_in()["boolq"], data_dir=tmp_path).items] == ["false", "true"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real test sets are not beside this checkout")
@pytest.mark.parametrize("name", ["arc_e", "arc_c", "obqa"])
def test_the_wording_fits_the_released_files(name: str, tmp_path: Path) -> None:
    """The released text taken apart into the source's columns gives the released text again."""
    released = json.loads((SHARED / "commonsense" / built_in()[name].data.folders[0] / "test.json").read_text())
    rows = []
    for row in released:
        head, choices, _ = row["instruction"].rsplit("\n\n", 2)
        texts = re.split(r" ?Answer\d: ", choices)[1:]
        question = head.removeprefix("Please choose the correct answer to the question: ")
        key = "ABCDE"[int(row["answer"][-1]) - 1]
        labels = list("ABCDE"[: len(texts)])
        rows.append(
            {"question": question, "question_stem": question, "choices": {"text": texts, "label": labels}, "answerKey": key}
        )
    write_rows(tmp_path / name / "test.jsonl", *rows)
    items = read_items(built_in()[name], data_dir=tmp_path).items
    assert [(item.asked, item.gold) for item in items] == [(row["instruction"], row["answer"]) for row in released]


@pytest.mark.parametrize(
    ("given", "found"),
    [("arc_challenge", "arc_c"), ("ARC-Easy", "arc_e"), ("social_iqa", "siqa"), ("openbookqa", "obqa"), ("MBPP+", "mbpp_plus")],
)
def test_aliases(given: str, found: str) -> None:
    assert canonical_name(given) == found


def test_groups_open_up_and_repeated_names_count_once() -> None:
    assert [task.name for task in find_tasks(["arithmetic", "gsm8k", "GSM8K"])] == ["gsm8k", "math", "math500"]


@pytest.mark.parametrize(
    ("wrong", "right"), [("arc_challange", "arc_c"), ("hellaswagg", "hellaswag"), ("comonsense", "commonsense"), ("obka", "obqa")]
)
def test_an_unknown_name_gets_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(DataError, match=f"there is no task {wrong}; did you mean {right}"):
        find_tasks([wrong])


OWN = """\
name: capitals
data:
  path: capitals.jsonl
prompt: "What is the capital of {{ country }}?"
answer: "{{ city }}"
metric: exact
pattern: 'Answer: (\\w+)'
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "tasks" / "capitals.jsonl", {"country": "France", "city": "Paris"}, {"country": "Peru", "city": "Lima"})
    (tmp_path / "tasks" / "capitals.yaml").write_text(OWN)
    items = read_items(read_task(tmp_path / "tasks" / "capitals.yaml"), limit=1)
    assert [(item.asked, item.gold) for item in items.items] == [("What is the capital of France?", "Paris")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("metric: exact\n", ""), r"capitals.yaml: metric is missing. How an answer is judged."),
        (("metric: exact", "metric: exactly"), r"capitals.yaml:6: metric is 'exactly'"),
        (("pattern: 'Answer: (\\w+)'\n", ""), r"pattern is missing: the metric exact compares what it finds"),
        (("metric: exact", "metric: choice"), r"choices and the metric `choice` go together"),
        (("(\\w+)", "(\\w+"), r"capitals.yaml:7: pattern: .*not a valid regular expression"),
        (
            ("prompt:", "promt:"),
            r"capitals.yaml has 2 problems:\n.*prompt is missing.*\n.*:4: unknown key promt; did you mean prompt\?",
        ),
        (("  path:", "  paht:"), r"data.path is missing(.|\n)*unknown key data.paht; did you mean path\?"),
        (("name: capitals", "name: [capitals"), r"capitals.yaml:2: not valid YAML"),
    ],
)
def test_a_task_file_with_a_hole_says_where(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "capitals.yaml"
    assert change[0] in OWN
    file.write_text(OWN.replace(*change))
    with pytest.raises(DataError, match=message):
        read_task(file)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "obqa.yaml"
    file.write_text(OWN.replace("capitals", "obqa"))
    with pytest.raises(DataError, match="two tasks are called obqa"):
        find_tasks(["obqa", str(file)])
