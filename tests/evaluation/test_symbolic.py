"""The process that compares formulas: bounded in time, usable from any thread, replaced when it dies, and it runs no code."""

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from abba_cli.errors import AbbaError
from abba_cli.evaluation.grading import symbolic
from abba_cli.evaluation.grading.symbolic import Judge, judged_equal


@pytest.mark.parametrize("power", ["9^{9^{9^{9}}}", "1000000000!", "((((((((((" * 15 + "1" + "))))))))))" * 15])
def test_algebra_without_end_is_ended(power: str) -> None:
    begun = time.monotonic()
    assert not judged_equal("math-verify", "3", power, seconds=0.5)
    assert time.monotonic() - begun < 30
    assert judged_equal("math-verify", "x^2-1", "(x-1)(x+1)")


def test_the_released_algebra_is_ended_too() -> None:
    assert not judged_equal("released", "3", "9**9**9**9", seconds=0.5)


def test_any_thread_may_ask() -> None:
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(judged_equal("math-verify", str(2 * n), f"{n}+{n}"))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8


def test_a_worker_that_died_is_replaced() -> None:
    assert judged_equal("released", "x+1", "1+x")
    worker = symbolic._workers[os.getpid()]
    worker.kill()
    worker.wait()
    assert judged_equal("released", "x+1", "1+x")


def test_a_fork_has_a_worker_of_its_own() -> None:
    assert judged_equal("released", "x+1", "1+x")
    child = os.fork()
    if child == 0:
        right = judged_equal("released", "2+x", "x+2") and not judged_equal("released", "2", "x+2")
        symbolic._stop(symbolic._workers[os.getpid()])
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert judged_equal("released", "x+1", "1+x")


ATTACKS = [
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w')",
    "open({number}, 'w')",
    "exec(chr(49))",
    "().__class__.__base__",
    "print(3)",
    'S(\'open("{file}", "w")\')',
    "sympify(N)",
    "preview(x)",
    "(3).real",
    "[open for open in ()]",
    "\uff4f\uff50\uff45\uff4e('{file}', 'w')",
    "breakpoint()",
    "input()",
    "exit()",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("judge", ["released", "math-verify"])
def test_no_answer_is_run(tmp_path: Path, attack: str, judge: Judge) -> None:
    file = tmp_path / "ran"
    text = attack.replace("{file}", str(file)).replace("{number}", "1")
    assert not judged_equal(judge, "3", text)
    assert not judged_equal(judge, text, "3")
    assert not file.exists()


def test_a_missing_library_is_said_once_and_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'math_verify'\"\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    if os.getpid() in symbolic._workers:
        symbolic._stop(symbolic._workers[os.getpid()])
    monkeypatch.setattr(symbolic.sys, "executable", str(broken))
    with pytest.raises(AbbaError, match=r"cannot be compared: ModuleNotFoundError: No module named 'math_verify'.*reinstall"):
        judged_equal("released", "1", "2")
    assert os.getpid() not in symbolic._workers
