"""Machines that lack a protection: what is said, what `weaker` still does, and ordinary users."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abba_cli.evaluation.sandbox import missing_protections

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="refuses calls of Linux")

# Refuses namespaces to this very process, as a locked-down container does.
LOCKED = """
import json, sys
from abba_cli.errors import RunError
from abba_cli.evaluation.sandbox import missing_protections, run_tests
from abba_cli.evaluation.sandbox.inside import call_filter, kernel
kernel.forbid_new_rights()
call_filter.install()
answers = [list(missing_protections())]
try:
    run_tests("def f(x): return x", "assert f(1) == 1")
except RunError as error:
    answers.append(str(error))
for program in json.loads(sys.argv[1]):
    verdict = run_tests(program, "assert f(1) == 2", weaker=True)
    answers.append([verdict.passed, verdict.reason])
print(json.dumps(answers))
"""
RIGHT = "\ndef f(x): return x + 1"


def locked(*programs: str) -> list[object]:
    done = subprocess.run([sys.executable, "-c", LOCKED, json.dumps(programs)], capture_output=True, text=True, check=True)
    answers: list[object] = json.loads(done.stdout)
    return answers


def test_a_machine_without_namespaces(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    refused = {
        "import os\nos.kill(os.getppid(), 15)": "os.kill",
        "import os\nos.fork()": "os.fork",
        "import socket\nsocket.socket()": "socket.__new__",
        "import subprocess\nsubprocess.run(['true'])": "subprocess.Popen",
        f"open({str(tmp_path / 'secret')!r})": "open",
        f"open({str(tmp_path / 'new')!r}, 'w')": "open",
        f"import os\nos.remove({str(tmp_path / 'secret')!r})": "os.remove",
        f"import os\nos.listdir({str(tmp_path)!r})": "os.listdir",
    }
    allowed = (
        RIGHT,
        "import os\nassert os.listdir() == []\nopen('x', 'w').write('y')\nassert open('x').read() == 'y'" + RIGHT,
        "import collections, re, random, heapq" + RIGHT,
        "import os\nassert 'ABBA_TEST_SECRET' not in os.environ" + RIGHT,
    )
    wrong = ("def f(x): return 1", "import os\nos._exit(0)", "import sys\nsys.exit(0)")
    os.environ["ABBA_TEST_SECRET"] = "s3cret"
    try:
        missing, message, *verdicts = locked(*allowed, *(program + RIGHT for program in refused), *wrong)
    finally:
        del os.environ["ABBA_TEST_SECRET"]
    assert isinstance(missing, list)
    assert {name.partition(" (")[0] for name in missing} >= {"mount namespace", "process namespace", "network namespace"}
    assert all(name.endswith(")") for name in missing), "each says why"
    assert isinstance(message, str)
    assert "missing: " in message
    assert "network namespace (Operation not permitted)" in message
    assert message.endswith("accept the others alone with `--sandbox weaker`")
    assert verdicts[: len(allowed)] == [[True, "passed"]] * len(allowed)
    for (_, event), (passed, reason) in zip(refused.items(), verdicts[len(allowed) :], strict=False):  # type: ignore[misc]
        assert not passed
        assert f"PermissionError: the sandbox refuses {event}" in reason
    assert [passed for passed, _ in verdicts[-len(wrong) :]] == [False] * len(wrong)  # type: ignore[misc]
    assert (tmp_path / "secret").read_text() == "s3cret"


ORDINARY = """
import os
from abba_cli.evaluation.sandbox import *
print(os.getuid(), missing_protections())
program = "import os\\ndef f(): return [os.getuid(), os.path.exists('/etc/passwd'), os.getpid()]"
print(run_tests(program, "assert f() == [12345, False, 1]"))
attack = "import os\\nfor n in (0, -1):\\n    try: os.kill(n, 9)\\n    except OSError: pass\\ndef f(): return 0"
print(run_tests(attack, "assert f() == 1"))
"""
CHECKOUT = Path(__file__).parents[2]


def everyone_may_enter(path: Path) -> bool:
    return path.exists() and all(folder.stat().st_mode & 0o005 == 0o005 for folder in (path, *path.parents))


@pytest.mark.skipif(os.getuid() != 0 or bool(missing_protections()), reason="needs root, to become someone else")
def test_an_ordinary_user_has_all_protections_by_a_user_namespace() -> None:
    usable = [path for path in (Path(sys.executable).resolve(), Path("/usr/bin/python3")) if everyone_may_enter(path)]
    if not usable or not everyone_may_enter(CHECKOUT):
        pytest.skip("Python or the checkout lies in a folder that only root may enter")
    version = subprocess.run([usable[0], "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True)
    if version.stdout != "True\n":
        pytest.skip("the system's Python is older than 3.11")
    environment = {"PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"}
    command = [usable[0], "-c", ORDINARY]
    done = subprocess.run(
        command, capture_output=True, text=True, user=12345, group=12345, extra_groups=[], env=environment, cwd="/"
    )
    if "user namespace" in done.stdout:
        pytest.skip(f"ordinary users have none here: {done.stdout}")
    assert done.stdout.splitlines() == [
        "12345 ()",
        "Verdict(passed=True, reason='passed')",
        "Verdict(passed=False, reason='AssertionError in test 1')",
    ], done.stderr
