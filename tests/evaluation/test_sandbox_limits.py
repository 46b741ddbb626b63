"""Programs that want too much end, and this process goes on: time, memory, processes, files, output."""

import os
import resource
import signal
import threading
import time

import pytest

from abba_cli.evaluation.sandbox import Limits, missing_protections, run_tests

pytestmark = pytest.mark.skipif(bool(missing_protections()), reason=f"missing here: {'; '.join(missing_protections())}")

TESTS = "assert f(1) == 2\n"
SMALL = Limits(wall_seconds=1, memory_bytes=400 << 20, file_bytes=1 << 20, output_bytes=1 << 20)
LONG = Limits(wall_seconds=40, memory_bytes=400 << 20, file_bytes=1 << 20, output_bytes=1 << 20)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import time\ndef f(x): time.sleep(1000)",
        "def f(x):\n    try:\n        while True: pass\n    finally:\n        while True: pass",
        "x = 9 ** 9 ** 9",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "def f(x):\n    while True:\n        yield 2\n",
    ],
)
def test_what_never_ends_is_ended(program: str) -> None:
    before = time.monotonic()
    verdict = run_tests(program, "assert list(f(1)) == [2]\n", limits=SMALL)
    assert not verdict.passed
    assert verdict.reason in ("timed out after 1 s", "MemoryError in test 1")
    assert time.monotonic() - before < 30


def test_cpu_time_is_limited_whatever_the_clock_says() -> None:
    verdict = run_tests("while True: pass", TESTS, limits=Limits(wall_seconds=60, cpu_seconds=1))
    assert verdict.reason == "killed at its limit of CPU time or memory"


def test_memory_is_limited() -> None:
    assert run_tests("x = bytearray(1 << 29)", TESTS, limits=LONG).reason == "MemoryError"
    grow = "def f(x):\n    kept = []\n    while True: kept.append(bytearray(10_000_000))"
    assert run_tests(grow, TESTS, limits=LONG).reason == "MemoryError in test 1"
    assert run_tests("import mmap\nmmap.mmap(-1, 1 << 30)", TESTS, limits=LONG).reason.startswith("OSError")


def test_memory_that_no_limit_counts_is_refused() -> None:
    program = "import os\ndef f(x): return os.memfd_create('x')"
    assert "PermissionError in test 1" in run_tests(program, TESTS, limits=LONG).reason


FORKS = """
import os, time
def f(x):
    for n in range(1000):
        try:
            child = os.fork()
        except OSError:
            return n
        if not child:
            time.sleep(60)
            os._exit(0)
"""
THREADS = """
import threading, time
def f(x):
    for n in range(1000):
        try:
            threading.Thread(target=time.sleep, args=(60,)).start()
        except RuntimeError:
            return n
"""


@pytest.mark.parametrize("program", [FORKS, THREADS])
def test_processes_and_threads_are_limited(program: str) -> None:
    assert run_tests(program, "assert 1 < f(1) < 16, f(1)", limits=Limits(wall_seconds=40)).passed
    assert run_tests(program, "assert 1 < f(1) < 4, f(1)", limits=Limits(wall_seconds=40, processes=4)).passed


FILES = """
import errno
def f(folder, size):
    for n in range(9999):
        try:
            with open(f"{folder}/{n}", "wb") as file:
                file.write(bytes(size))
        except OSError as error:
            return [n, errno.errorcode[error.errno]]
"""


def test_files_and_their_sum_are_limited() -> None:
    tests = "for folder in ('.', '/tmp'):\n    assert f(folder, 2 << 20) == [0, 'EFBIG']\n"
    assert run_tests(FILES, tests, limits=LONG).passed
    tests = "for folder in ('.', '/tmp'):\n    n, code = f(folder, 100_000)\n    assert 5 <= n <= 10 and code == 'ENOSPC'\n"
    assert run_tests(FILES, tests, limits=LONG).passed


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_costs_nothing(stream: str) -> None:
    flood = f"import sys\nfor _ in range(2000): sys.{stream}.write('x' * 100_000)\ndef f(x): return x + 1"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_tests(flood, TESTS, limits=LONG).passed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_huge_or_endless_result_is_an_error() -> None:
    assert "a result that cannot be sent: TooLarge" in run_tests("def f(x): return 'x' * (2 << 20)", TESTS, limits=LONG).reason
    loop = "def f(x):\n    x = []\n    x.append(x)\n    return x"
    assert "a result that cannot be sent: RecursionError" in run_tests(loop, TESTS, limits=LONG).reason
    flood = "import os\nfor n in range(3, 64):\n    try: os.write(n, b'\\xff' * 64)\n    except OSError: pass\n"
    assert run_tests(flood, TESTS, limits=LONG).reason == "left before the tests ended"


def test_recursion_without_end() -> None:
    assert run_tests("def f(x): return f(x)", TESTS, limits=LONG).reason.startswith("RecursionError in test 1")
    deep = (
        "import sys\nsys.setrecursionlimit(10**8)\nclass A:\n    __repr__ = lambda self: repr(self)\ndef f(x): return repr(A())"
    )
    assert "crashed with signal 11" in run_tests(deep, TESTS, limits=LONG).reason
    assert "crashed with signal 11" in run_tests("import ctypes\ndef f(x): ctypes.string_at(0)", TESTS, limits=LONG).reason


SEND = """
import os
for target in (*TARGETS, os.getppid(), -os.getpgid(0)):
    for number in (15, 2, 1, 10, 9):
        try:
            os.kill(target, number)
        except OSError:
            pass
def f(x): return x - 1
"""


def test_signals_do_not_reach_this_process() -> None:
    heard: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in numbers}
    try:
        targets = [0, -1, 1, os.getpid(), -os.getpgid(0)]
        verdict = run_tests(SEND.replace("TARGETS", str(targets)), TESTS, limits=LONG)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not verdict.passed
    assert heard == []


def test_runs_from_several_threads_at_once() -> None:
    verdicts: dict[int, bool] = {}

    def one(n: int) -> None:
        verdicts[n] = run_tests(f"def f(x): return x + {n % 2}", TESTS, limits=LONG).passed

    threads = [threading.Thread(target=one, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {n: n % 2 == 1 for n in range(6)}
