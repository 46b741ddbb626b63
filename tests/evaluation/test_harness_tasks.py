"""What the harness may be asked for, and where its rows come from."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness_rows import arc_rows, gsm8k_rows, load_speaker, settings, write_rows, write_tokenizer
from models import write_model

pytest.importorskip("lm_eval")

from abba_cli.errors import AbbaError, DataError, ModelError
from abba_cli.evaluation.harness.scoring import HarnessScore, check_tasks, harness_name, score_with_harness
from abba_cli.evaluation.harness.tasks import KNOWN, leaves, task_manager
from abba_cli.speakers import Speaker

OWN = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    folder = tmp_path_factory.mktemp("models")
    return load_speaker(write_model(folder / "llama", write_tokenizer(folder / "tokenizer")))


def test_our_names_are_theirs() -> None:
    check_tasks(list(KNOWN))
    index = task_manager(list(KNOWN)).task_index
    assert len(index) < 500, "the whole list takes many seconds to read"
    assert all(index[harness_name(task)].name == known.theirs for task, known in KNOWN.items())
    assert harness_name("siqa") == "social_iqa"
    assert harness_name("mmlu_anatomy") == "mmlu_anatomy"
    assert len(leaves(index, harness_name("math"))) == 7
    check_tasks(["mmlu", "sciq", "arc_challenge"])


@pytest.mark.slow
def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(DataError, match=r"the harness has no task, group or tag arc_chalenge; did you mean arc_challenge,"):
        check_tasks(["boolq", "arc_chalenge"])


@pytest.mark.parametrize("task", ["humaneval", "mbpp", "humaneval_plus", "mbpp_plus", "mbpp_instruct", "cruxeval_input"])
def test_tasks_that_run_code_are_refused(task: str) -> None:
    with pytest.raises(DataError, match=rf"task {task} runs code that the model writes.*--protocol paper --allow-code-execution"):
        check_tasks([task])


def test_files_are_looked_at_before_a_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"

    def problem(text: str) -> str:
        file.write_text(text)
        with pytest.raises(DataError) as caught:
            check_tasks([str(file)])
        return str(caught.value)

    (tmp_path / "base.yaml").write_text("unsafe_code: true\nprocess_results: !function nowhere.judge\n")
    assert f"task {file} runs code that the model writes" in problem("include: base.yaml\ntask: own\n")
    assert "expected the key `task` with its name" in problem("doc_to_text: hello\n")
    assert "is the file of a group; name its tasks" in problem("group: both\ntask: [arc_easy, arc_challenge]\n")
    assert f"cannot read the task file {file}: while parsing" in problem("task: [")
    assert "expected keys such as" in problem("- task")
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read the task file .*: No such file"):
        check_tasks([str(file)])


def test_without_the_harness_the_message_names_the_extra() -> None:
    code = """
import sys
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
from abba_cli.evaluation.harness.scoring import check_tasks
try:
    check_tasks(["boolq"])
except Exception as error:
    print(type(error).__name__, error)
assert "lm_eval" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = (
        "ModelError the protocol `harness` needs lm-evaluation-harness; install it with `pip install 'abba-cli[harness]'`\n"
    )
    assert done.stdout == expected


def failure(speaker: Speaker, task: str, tmp_path: Path, data: Path | None, **changes: Any) -> tuple[type[AbbaError], str]:
    with pytest.raises(AbbaError) as caught:
        score_with_harness(speaker, [task], **settings(tmp_path / "cache", data, **changes))
    return type(caught.value), str(caught.value)


def test_no_network_and_no_file(speaker: Speaker, tmp_path: Path) -> None:
    _, message = failure(speaker, "boolq", tmp_path, None)
    assert message == (
        "task boolq: no --data-dir was given; aps/super_glue boolq of the hub cannot be loaded: the hub cannot be reached and it "
        "is not in the local cache; check the network, or name a local directory. "
        "Put its split validation, in its own columns, at DIR/boolq/validation.jsonl and give --data-dir DIR"
    )
    _, message = failure(speaker, "siqa", tmp_path, tmp_path)
    assert f"task social_iqa: in {tmp_path} there is no social_i_qa/validation.jsonl (or .json, .parquet)" in message


def test_rows_of_llm_adapters_are_not_enough(speaker: Speaker, tmp_path: Path) -> None:
    row = {"instruction": "True or false: is ice cold?", "input": "", "output": "the correct answer is true", "answer": "true"}
    for name in ("boolq", "ARC-Easy"):
        (tmp_path / "commonsense" / name).mkdir(parents=True)
        file = tmp_path / "commonsense" / name / "test.json"
        file.write_text(json.dumps([row]))
        kind, message = failure(speaker, "boolq" if name == "boolq" else "arc_e", tmp_path, tmp_path)
        assert kind is DataError
        assert f"{file} is in the form of LLM-Adapters (instruction, output), which the protocol `paper` reads" in message


def test_rows_that_do_not_fit(speaker: Speaker, tmp_path: Path) -> None:
    def problem(rows: list[dict[str, Any]], **changes: Any) -> str:
        write_rows(tmp_path / "ARC-Easy", "test", rows)
        kind, message = failure(speaker, "arc_e", tmp_path, tmp_path, **changes)
        assert kind is DataError
        return message

    file = tmp_path / "ARC-Easy" / "test.jsonl"
    rows = arc_rows(4)
    assert f"task arc_easy: {file}, row 2 does not fit: ValueError" in problem([*rows[:2], rows[2] | {"answerKey": "F"}])
    assert f"{file}, row 1 differs from the first in its columns: answerKey, id" in problem(
        [rows[0], {key: rows[1][key] for key in ("question", "choices")}]
    )
    assert "it has the columns text. Expected are those of the data set" in problem([{"text": "hello"}])
    assert f"{file} has columns of mixed types" in problem([rows[0], rows[1] | {"question": 7}])
    file.write_text('{"id": 1}\n{"id": \n')
    assert failure(speaker, "arc_e", tmp_path, tmp_path)[1].startswith(f"{file}:2: not valid JSON")
    message = problem(rows, shots=3)
    assert "its 3 worked examples come from the split train, and" in message
    assert "ask for none with --shots 0" in message


def test_what_a_task_needs_beside_the_harness(speaker: Speaker, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("import no_such_package\n")
    (tmp_path / "own.yaml").write_text("task: own\nprocess_results: !function judge.judge\n")
    kind, message = failure(speaker, str(tmp_path / "own.yaml"), tmp_path, None)
    assert kind is ModelError
    assert "needs what is not installed: No module named 'no_such_package'" in message


def test_the_file_of_a_task(speaker: Speaker, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "mine", arc_rows(13, seed=3))
    file = tmp_path / "own.yaml"
    file.write_text(OWN.format(name="own", file=rows))
    check_tasks([str(file)])
    [own] = score_with_harness(speaker, [str(file)], **settings(tmp_path / "cache", None))
    assert (own.task, own.metric, own.primary, own.n) == (str(file), "acc", True, 13)


def test_a_group_is_the_mean_over_all_documents_of_its_members(speaker: Speaker, tmp_path: Path) -> None:
    subjects = ["algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalc"]
    for count, subject in enumerate(subjects, start=1):
        rows = [
            {"problem": f"What is {number} + {count}?", "solution": f"It is $\\boxed{{{number + count}}}$."}
            for number in range(count)
        ]
        write_rows(tmp_path / f"hendrycks_math_{subject}", "test", rows)
    given = settings(tmp_path / "cache", tmp_path, batch_size=32)
    assert score_with_harness(speaker, ["hendrycks_math"], **given)[0].value == 0
    # As if the model always said 7: right for one question of each of the last four members, and for one of 5 + 2 and so on.
    [kept] = (tmp_path / "cache").iterdir()
    answers = [json.loads(line) for line in kept.read_text().splitlines() if line]
    kept.write_text("".join(json.dumps([key, "$7$"]) + "\n" for key, _ in answers))

    group, *members = score_with_harness(speaker, ["hendrycks_math"], **given)
    right = [[float(number + count == 7) for number in range(count)] for count in range(1, 8)]
    assert [score.value for score in members] == [sum(one) / len(one) for one in right]
    assert [score.task for score in members] == [f"hendrycks_math_{subject}" for subject in subjects]
    assert (group.task, group.metric, group.primary, group.n) == ("hendrycks_math", "exact_match", True, 28)
    assert not any(score.primary for score in members)
    assert list((group.scores or {}).values()) == [score for one in right for score in one]
    assert group.value == pytest.approx(sum(map(sum, right)) / 28)
    # The first member has one row, and no error of its own: that of the mean over all rows stands in.
    share = sum(map(sum, right)) / 28
    assert group.stderr == pytest.approx((share * (1 - share) / 27) ** 0.5)
    assert group.data.endswith("hendrycks_math_algebra/test.jsonl and 6 more")


@pytest.mark.parametrize(
    ("task", "folder", "split", "rows"),
    [
        ("boolq", "boolq", "validation", [{"passage": "Ice is cold.", "question": "is ice cold", "label": 1}]),
        ("piqa", "piqa", "validation", [{"goal": "cool water", "sol1": "freeze it", "sol2": "boil it", "label": 0}]),
        (
            "siqa",
            "social_i_qa",
            "validation",
            [{"context": "Al ran.", "question": "Why?", "answerA": "fun", "answerB": "fear", "answerC": "rain", "label": "3"}],
        ),
        (
            "hellaswag",
            "hellaswag",
            "validation",
            [{"activity_label": "Run", "ctx_a": "Al", "ctx_b": "he", "endings": ["ran.", "sat.", "ate.", "sang."], "label": "1"}],
        ),
        (
            "winogrande",
            "winogrande",
            "validation",
            [{"sentence": "The cup broke the _ is sad.", "option1": "cup", "option2": "man", "answer": "2"}],
        ),
        (
            "obqa",
            "openbookqa",
            "test",
            [
                {
                    "question_stem": "Ice is",
                    "choices": {"text": ["hot", "red", "cold", "old"], "label": list("ABCD")},
                    "answerKey": "C",
                }
            ],
        ),
    ],
)
def test_every_source_in_its_own_columns(
    speaker: Speaker, tmp_path: Path, task: str, folder: str, split: str, rows: list[dict[str, Any]]
) -> None:
    file = write_rows(tmp_path / folder, split, rows)
    gold = {"boolq": "yes", "piqa": "freeze it", "siqa": "rain", "hellaswag": "sat.", "winogrande": "The cup broke the man"}
    scores: list[HarnessScore] = score_with_harness(speaker, [task], **settings(tmp_path / "cache", tmp_path))
    [primary] = [score for score in scores if score.primary]
    assert (primary.n, primary.data) == (1, str(file))
    assert primary.metric == ("acc_norm" if task in ("piqa", "hellaswag", "obqa") else "acc")
    assert primary.examples[0].gold == gold.get(task, "cold")


def test_parts_of_a_group_have_folders_of_their_own(speaker: Speaker, tmp_path: Path) -> None:
    """Also as the hub stores them: a parquet file a split, in a folder a subset."""
    from datasets import Dataset

    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    Dataset.from_list(gsm8k_rows(2)).to_parquet(folder / "test-00000-of-00001.parquet")
    scores = score_with_harness(speaker, ["gsm8k"], **settings(tmp_path / "cache", tmp_path))
    assert scores[0].n == 2
    _, message = failure(speaker, "math", tmp_path, tmp_path)
    assert "math/algebra/test.jsonl" in message or "antlr4" in message
