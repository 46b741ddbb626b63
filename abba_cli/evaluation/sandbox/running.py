"""One program against its tests, each in a jail of its own, under this process's clock."""

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from abba_cli.errors import RunError
from abba_cli.evaluation.sandbox.contract import Limits, Verdict
from abba_cli.evaluation.sandbox.jails import Jailed, end, start
from abba_cli.evaluation.sandbox.protections import missing_protections

_START_SECONDS = 60  # to be shut in; the program's own clock starts afterwards


def run_tests(program: str, tests: str, *, weaker: bool = False, limits: Limits = Limits()) -> Verdict:  # noqa: B008
    """Run a program's text, and then tests of what it defines in another process.

    The tests use the program's names as if they stood in one file. Arguments and results go over as copies of plain data; other
    objects stay with the program, and the tests get a stand-in.

    Args:
        program: Python text, trusted with nothing.
        tests: Python text from the data set; they pass if they end without an exception.
        weaker: Run with the protections that there are, where some are missing.
        limits: Of the run.

    Raises:
        RunError: Protections are missing here, and `weaker` is False.
    """
    missing = missing_protections()
    if missing and not weaker:
        raise _refusal(missing)
    if os.name != "posix":
        raise RunError("code that a model has written can be run on Linux and macOS only")
    with ExitStack() as stack:
        home = stack.enter_context(_home()) if missing else "/"
        report, write_report = os.pipe()
        stack.callback(os.close, report)
        ends = socket.socketpair()
        try:
            tested = start(Jailed("program", program, ends[0].fileno(), None), limits, weaker, home)
            stack.callback(end, tested)
            tester = start(Jailed("tests", tests, ends[1].fileno(), write_report), limits, weaker, home)
            stack.callback(end, tester)
        finally:
            os.close(write_report)
            for one in ends:
                one.close()
        readiness = _message(report, _START_SECONDS)
        if not readiness or readiness["missing"]:
            raise _refusal(tuple((readiness or {}).get("missing", ("a process to be shut in (it did not start)",))))
        found = _message(report, limits.wall_seconds)
        if found is None:
            return Verdict(False, f"timed out after {limits.wall_seconds:g} s")
        if found.get("gone"):
            return Verdict(False, _why_gone(tested, found["reason"]))
        return Verdict(
            found.get("passed") is True, found.get("reason", "the tests' own process ended, by a limit of memory or CPU time")
        )


def _why_gone(tested: subprocess.Popen[bytes], reason: str) -> str:
    try:
        status = tested.wait(timeout=1)
    except subprocess.TimeoutExpired:  # it closed the link and lives on
        return reason
    # Where there is a process namespace, the status is handed on by the process that waits outside of it.
    signal_number = -status if status < 0 else status - 128
    if signal_number == signal.SIGKILL:
        return "killed at its limit of CPU time or memory"
    return reason if signal_number <= 0 else f"crashed with signal {signal_number}"


def _message(report: int, seconds: float) -> dict[str, Any] | None:
    """The next line of the report; empty if the process ended without one, None if the time ran out."""
    deadline = time.monotonic() + seconds
    ready = select.poll()
    ready.register(report, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        byte = os.read(report, 1)
        if not byte:
            return {}
        line += byte
    message: dict[str, Any] = json.loads(line)
    return message


@contextmanager
def _home() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="abba-sandbox-") as folder:
        os.chmod(folder, 0o777)  # the program runs as another user, if it can
        yield folder


def _refusal(missing: tuple[str, ...]) -> RunError:
    return RunError(
        f"this machine does not give the sandbox all of its protections; missing: {'; '.join(missing)}. Run on a Linux where "
        "they are there, or accept the others alone with `--sandbox weaker`"
    )
