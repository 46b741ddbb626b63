"""Questions about formulas, answered by another process: computer algebra may run for ever, and cannot be stopped from inside.

A timer inside this process would not do: signals reach the main thread only, and no signal interrupts 9**9**9**9 in C.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from typing import Literal

from abba_cli.errors import AbbaError

Judge = Literal["math-verify", "released"]

SECONDS = 5.0  # of processor time for one question, so that a busy machine judges alike; MATH-500 needs less than one

_lock = threading.Lock()
_workers: dict[int, "subprocess.Popen[str]"] = {}  # by process id: a fork must not talk to its parent's worker


def judged_equal(judge: Judge, gold: str, prediction: str, seconds: float = SECONDS) -> bool:
    """Ask a judge whether two formulas are equal; no answer in time, or a crash, is False.

    Args:
        judge: `math-verify`, or the algebra of the paper's released code.
        gold: The right answer.
        prediction: The answer given.
        seconds: Of processor time, after which the worker ends itself.

    Raises:
        AbbaError: The worker does not start.
    """
    question = json.dumps([judge, gold, prediction, seconds]) + "\n"
    with _lock:
        worker = _workers.get(os.getpid())
        if worker is not None and worker.poll() is not None:
            _stop(worker)
            worker = None
        worker = worker or _start()
        try:
            answer = _exchange(worker, question)
        except BaseException:  # an interrupted exchange would leave its answer for the next question
            _stop(worker)
            raise
        if not answer:
            _stop(worker)
    return answer == "true"


def _start() -> "subprocess.Popen[str]":
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "abba_cli.evaluation.grading.symbolic_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is this process's to handle
    )
    _workers[os.getpid()] = worker
    try:
        greeting = _exchange(worker, "")
    except BaseException:
        _stop(worker)
        raise
    if greeting != "ready":
        _stop(worker)
        raise AbbaError(
            f"formulas cannot be compared: {greeting or 'the worker process ended at once'}; "
            "expected math-verify and sympy to be importable: reinstall abba-cli"
        )
    return worker


def _exchange(worker: "subprocess.Popen[str]", question: str) -> str:
    """Return the worker's next line, or "" if it ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(question)
        worker.stdin.flush()
        return worker.stdout.readline().rstrip("\n")
    except BrokenPipeError:
        return ""


def _stop(worker: "subprocess.Popen[str]") -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except BrokenPipeError:  # what was not flushed is lost, as it should be
            pass
    _workers.pop(os.getpid(), None)


@atexit.register
def _stop_mine() -> None:
    worker = _workers.get(os.getpid())
    if worker is not None:
        _stop(worker)
