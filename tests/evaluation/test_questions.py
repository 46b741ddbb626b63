"""The rows of a task: found in folders, unreadable ones told of, worked examples, and the prompt's tokens."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from abba_cli.errors import DataError
from abba_cli.evaluation.questions import ask, prompt_hash, read_items
from abba_cli.evaluation.tasks import built_in, read_task
from abba_cli.prompts import load_template

GSM8K = built_in()["gsm8k"]


def word_problem(number: int) -> dict[str, str]:
    return {"question": f"What is {number} + 1?", "answer": f"It is <<{number}+1={number + 1}>>{number + 1}.\n#### {number + 1}"}


def write_rows(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("place", ["gsm8k/test.jsonl", "GSM8K/test.json", "arithmetic/gsm8k/test.jsonl.gz"])
def test_local_files_are_found_by_folder_group_and_suffix(tmp_path: Path, place: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    rows = [word_problem(number) for number in range(3)]
    text = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    items = read_items(GSM8K, data_dir=tmp_path)
    assert items.source == str(file)
    assert [item.gold for item in items.items] == ["1", "2", "3"]


def test_rows_that_cannot_be_read_are_named_by_line_and_counted(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "gsm8k" / "test.jsonl",
        word_problem(1),
        '{"question": "cut sho\n',
        {"question": "No answer?"},
        {"question": "No number?", "answer": "who knows"},
        "[1, 2]\n",
        {"question": " ", "answer": "#### 3"},
        word_problem(2),
    )
    items = read_items(GSM8K, data_dir=tmp_path)
    assert [item.asked for item in items.items] == ["What is 1 + 1?", "What is 2 + 1?"]
    assert [line.split(" ")[0] for line in items.unreadable] == [f"{file}:{number}:" for number in (2, 5, 3, 4, 6)]
    assert "not valid JSON" in items.unreadable[0]
    assert "uses `answer`, which is not there" in items.unreadable[2]


def test_a_column_that_holds_nothing_is_not_asked_as_a_word(tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k" / "test.jsonl", word_problem(1), {"question": None, "answer": "#### 3"})
    items = read_items(GSM8K, data_dir=tmp_path)
    assert len(items.items) == 1
    assert "the prompt of task gsm8k uses `question`, which is not there: found `answer`" in items.unreadable[0]


def test_a_file_without_a_readable_row_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k" / "test.jsonl", {"text": "x"})
    with pytest.raises(DataError, match=r"task gsm8k: no row can be read; the first: .*test.jsonl:1: .*`question`"):
        read_items(GSM8K, data_dir=tmp_path)


def test_an_answer_that_is_no_choice_is_an_unreadable_row(tmp_path: Path) -> None:
    rows = [{"instruction": "Sky?", "answer": answer, "output": ""} for answer in ("true", "maybe")]
    write_rows(tmp_path / "boolq" / "test.jsonl", *rows)
    items = read_items(built_in()["boolq"], data_dir=tmp_path)
    assert len(items.items) == 1
    assert "the answer is 'maybe'; expected one of true, false" in items.unreadable[0]


def test_missing_data_offline_says_which_file_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"in .* there is no ARC-Challenge/test.jsonl .*Put the file at DIR/ARC-Challenge/test.jsonl"
    ):
        read_items(built_in()["arc_c"], data_dir=tmp_path)
    with pytest.raises(
        DataError, match=r"no --data-dir was given; .*Put the file at DIR/mbpp/mbpp.jsonl and give --data-dir DIR"
    ):
        read_items(built_in()["mbpp"])


def mbpp_row(number: int) -> dict[str, Any]:
    return {
        "task_id": number + 1,
        "text": f"Return {number}.",
        "code": f"def f():\n    return {number}",
        "test_list": [f"assert f() == {number}"],
    }


def test_a_file_with_every_split_is_cut_where_the_splits_lie(tmp_path: Path) -> None:
    write_rows(tmp_path / "mbpp" / "mbpp.jsonl", *(mbpp_row(number) for number in range(974)))
    mbpp = built_in()["mbpp"]
    assert [item.row["task_id"] for item in read_items(mbpp, data_dir=tmp_path).items] == list(range(11, 511))
    assert read_items(mbpp, split="train", data_dir=tmp_path).items[0].row["task_id"] == 601
    with pytest.raises(DataError, match="mbpp has no split dev; expected one of prompt, test, validation, train"):
        read_items(mbpp, split="dev", data_dir=tmp_path)


def test_worked_examples_come_from_their_own_split_by_seed(tmp_path: Path, tiny_llama: Path) -> None:
    write_rows(tmp_path / "gsm8k" / "test.jsonl", word_problem(100))
    write_rows(tmp_path / "gsm8k" / "train.jsonl", *(word_problem(number) for number in range(20)))
    drawn = [read_items(GSM8K, data_dir=tmp_path, shots=3, seed=seed).shots for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    items = read_items(GSM8K, data_dir=tmp_path, shots=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    [question] = ask(items, load_template("chat", tokenizer))
    turns = [
        {"role": role, "content": text} for shot in items.shots for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    turns.append({"role": "user", "content": "What is 100 + 1?"})
    assert question.text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert list(question.ids) == tokenizer(question.text)["input_ids"]
    assert all(f"#### {answer.rpartition(' ')[2]}" in question.text for _, answer in items.shots)


def test_too_few_or_no_worked_examples_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k" / "test.jsonl", word_problem(1))
    write_rows(tmp_path / "gsm8k" / "train.jsonl", word_problem(2))
    with pytest.raises(DataError, match="has 1 rows for worked examples, --shots asks for 2"):
        read_items(GSM8K, data_dir=tmp_path, shots=2)
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass", "test": "", "entry_point": "f"}
    write_rows(tmp_path / "humaneval" / "HumanEval.jsonl", row)
    with pytest.raises(DataError, match="task humaneval has no worked examples"):
        read_items(built_in()["humaneval"], data_dir=tmp_path, shots=2)


def test_the_papers_prompt_is_alpaca_with_its_ending(tmp_path: Path, tiny_llama: Path) -> None:
    write_rows(tmp_path / "gsm8k" / "test.jsonl", word_problem(1))
    template = load_template("alpaca", AutoTokenizer.from_pretrained(tiny_llama))
    [question] = ask(read_items(GSM8K, data_dir=tmp_path), template, paper=True)
    assert question.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is 1 + 1?\n\n### Response: Let's think step by step."
    )


def test_code_is_continued_where_there_is_no_prompt_template(tmp_path: Path, tiny_llama: Path) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass", "test": "", "entry_point": "f"}
    write_rows(tmp_path / "humaneval" / "HumanEval.jsonl", row)
    items = read_items(built_in()["humaneval"], data_dir=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain, chat = (ask(items, load_template(name, tokenizer))[0] for name in ("none", "chat"))
    assert plain.text == "def f():\n"
    assert "\ndef " in plain.stop
    assert "```python\ndef f():\n```" in chat.text
    assert chat.stop == ()
    assert prompt_hash([plain]) != prompt_hash([chat])


def test_a_users_folder_of_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "test.jsonl", {"q": "a?", "a": "yes"})
    write_rows(tmp_path / "data" / "train.jsonl", {"q": "b?", "a": "no"})
    (tmp_path / "own.yaml").write_text(
        "name: own\ndata: {path: data}\nprompt: '{{ q }}'\nanswer: '{{ a }}'\nreference: '{{ gold }}'\nmetric: choice\n"
        "choices: ['yes', 'no']\n"
    )
    items = read_items(read_task(tmp_path / "own.yaml"), shots=1)
    assert [item.asked for item in items.items] == ["a?"]
    assert items.shots == [("b?", "no")]
