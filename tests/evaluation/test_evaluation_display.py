"""What `abba eval` shows, in a log file and on a pseudo-terminal."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from made_results import answer, beside, evaluation, model, scored
from rich.console import Console

from abba_cli.events import Note, Scored, Stage
from abba_cli.ui import evaluation as display
from abba_cli.ui import progress
from abba_cli.ui.evaluation import EvaluationDisplay, show_results


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is moved."""
    now = [100.0]
    for module in (display, progress):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def log(width: int = 120) -> tuple[Console, Callable[[], list[str]]]:
    stream = io.StringIO()
    return Console(file=stream, width=width), lambda: stream.getvalue().splitlines()


def test_lines_in_a_log(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with EvaluationDisplay(console) as show:
        show(Note("takes out/newest, the newest run"))
        show(Stage("Loading the model"))
        show(Scored("tuned", "boolq", 0, 100, 0.0, 0))
        for done in range(10, 100, 10):
            clock(4)
            show(Scored("tuned", "boolq", done, 100, done / 2, 0))
        clock(4)
        show(Scored("tuned", "boolq", 100, 100, 50.5, 0))
        show(Scored("base", "boolq", 100, 100, 25.0, 100))
    assert lines() == [
        "takes out/newest, the newest run",
        "Loading the model ...",
        "tuned",
        # Three steps of four seconds are the first that are ten seconds apart; 4 seconds for each of the rows' tenths.
        "  boolq  30/100  50.0% so far, 0:28 left",
        "  boolq  60/100  50.0% so far, 0:16 left",
        "  boolq  90/100  50.0% so far, 0:04 left",
        "  boolq  50.5% of 100 rows, 0:40",
        "base",
        "  boolq  25.0% of 100 rows, 100 of them from before, 0:00",
    ]


def test_reused_rows_do_not_make_it_look_fast(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with EvaluationDisplay(console) as show:
        show(Scored("tuned", "boolq", 800, 1000, 400, 800))
        clock(20)
        show(Scored("tuned", "boolq", 810, 1000, 405, 800))  # 10 rows in 20 seconds: 190 more take 380
        clock(20)
        show(Scored("tuned", "boolq", 910, 1000, 455, 890))  # 20 rows in 40 seconds, however many were reused: 90 take 180
    assert [line.split(", ")[-1] for line in lines()[1:]] == ["6:20 left", "3:00 left"]


def test_before_the_first_row_nothing_is_guessed(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with EvaluationDisplay(console) as show:
        clock(30)
        show(Scored("tuned", "boolq", 0, 1000, 0.0, 0))
    assert lines() == ["tuned", "  boolq  0/1,000  - so far, -:-- left"]


def test_a_terminal_gets_a_bar() -> None:
    """A real pseudo-terminal: what is written to it is what a terminal gets."""
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as stream:
        console = Console(file=stream, force_terminal=True, width=80, color_system=None)
        with EvaluationDisplay(console) as show:
            show(Stage("Reading rows [1]", 5, 10))
            show(Scored("tuned [b]", "mmlu_high_school_computer_science", 10, 1000, 5.0, 0))
            show._bar._bar.refresh()  # as its thread does ten times a second
            show(Note("out of memory: batch size 8 -> 4"))
            show(Scored("tuned [b]", "mmlu_high_school_computer_science", 1000, 1000, 1000.0, 0))
        stream.flush()
        os.set_blocking(leader, False)
        written = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                written += os.read(leader, 100_000)
    os.close(leader)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    bar = next(line for line in lines if "10/1,000" in line)
    assert bar.startswith("mmlu_high_school_com ... ")
    assert bar.endswith("10/1,000  50.0% so far, -:-- left")
    assert len(bar) <= 80
    for kept in ("tuned [b]", "out of memory: batch size 8 -> 4", "mmlu_high_school_com ...  100.0% of 1,000 rows, 0:00"):
        assert kept in lines
    assert b"\x1b[?25h" in written, "the cursor stays hidden"


def test_the_closing_lines(tmp_path: Path) -> None:
    for name in ("results.json", "samples.jsonl", ".lock"):
        (tmp_path / name).write_text("")
    examples = (
        answer("the correct answer is true\nfor\x1b[31m sure " + "and so on " * 20, "true", 1.0),
        answer("the correct answer is true", "true", 1.0),
        answer("", None, 0.0),
    )
    results = evaluation(
        scored("boolq", 0.6, extraction_failures=3, unreadable_rows=1, difference=beside(0.5, 0.6), examples=examples),
        scored("gsm8k", 0.2, unmarked=12, disagreements=4),
        scored("boolq", 0.5, "base", extraction_failures=77),
        scored("piqa", 0.5, examples=(answer("solution2", "solution2", 0.0),)),
        models=(model(), model("base", role="baseline")),
    )
    console, lines = log(width=80)
    show_results(console, results, tmp_path)
    assert all(len(line) <= 80 for line in lines() if not line.startswith("results.json"))
    shown = [line.rstrip() for line in lines()]
    after = shown[shown.index("Answers") :]
    assert shown[5 : shown.index("Answers")] == [
        "boolq: 3 without an answer, scored 0; 1 not readable and not in n",
        "gsm8k: 12 read as the last number; 4 judged otherwise by the released rules",
        "boolq (baseline): 77 without an answer, scored 0",
    ]
    assert after[1:3] == ["  piqa  wrong  read as solution2, right is true", "    solution2"]
    assert after[3] == "  boolq  right  read as true"
    assert after[4].startswith("    the correct answer is true for\ufffd[31m sure and so on")
    assert after[4].endswith(" ...")
    assert after[5:] == [
        "  boolq  wrong  nothing found, right is true",
        "    (empty)",
        f"results.json, samples.jsonl in {tmp_path}",
    ]


def test_nothing_went_wrong_and_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("")
    console, lines = log()
    show_results(console, evaluation(scored("boolq", 0.6)), tmp_path)
    assert len(lines()) == 4  # title, headings, a row, the file


def test_many_tasks_show_one_answer_each(tmp_path: Path) -> None:
    tasks = [scored(f"task{i}", 0.5, examples=(answer("a", "a", 1.0), answer("b", "b", 0.0))) for i in range(5)]
    console, lines = log()
    show_results(console, evaluation(*tasks), tmp_path)
    assert sum("  right  " in line for line in lines()) == 5
    assert not any("  wrong  " in line for line in lines())
