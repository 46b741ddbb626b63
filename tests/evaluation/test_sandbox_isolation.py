"""What a program sees of the machine: no files, secrets, networks or processes but its own; and nothing outlives it."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

from abba_cli.evaluation.sandbox import Limits, missing_protections, run_tests

pytestmark = pytest.mark.skipif(bool(missing_protections()), reason=f"missing here: {'; '.join(missing_protections())}")

LIMITS = Limits(wall_seconds=40)


def returned(body: str, test: str) -> None:
    """Run a function's body in the sandbox and hold its result to a test."""
    program = "import os, sys\ndef f():\n" + "".join(f"    {line}\n" for line in body.splitlines())
    verdict = run_tests(program, f"got = f()\nif not ({test}):\n    raise ValueError(got)\n", limits=LIMITS)
    assert verdict.passed, verdict.reason


def running(mark: str) -> list[str]:
    """Processes of this machine with a mark in their command."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in file.read_bytes():
                found.append(file.parent.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABBA_TEST_SECRET", "s3cret")
    names = {"PATH", "HOME", "LANG", "PYTHONHASHSEED", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
    returned("return dict(os.environ)", f"got.keys() == {names!r} and 's3cret' not in str(got)")
    returned("import subprocess\nreturn subprocess.run(['env'], capture_output=True, text=True).stdout", "'s3cret' not in got")


def test_files_of_the_user_cannot_be_seen(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o666)
    paths = [str(path) for path in (secret, tmp_path, "/etc/passwd", "/proc/self", "/sys", "/var", "/run", __file__)]
    assert all(os.path.exists(path) for path in paths)
    with tempfile.NamedTemporaryFile(dir=Path.home()) as at_home:
        returned(f"return [path for path in {[*paths, at_home.name]!r} if os.path.lexists(path)]", "got == []")


HOME = """
home = os.path.expanduser("~")
before = os.listdir(home)
open("note", "w").write("x")
return [before, home == os.getcwd(), os.listdir(home)]
"""


def test_the_home_is_empty_writable_and_its_own() -> None:
    returned(HOME, "got == [[], True, ['note']]")
    returned(HOME, "got == [[], True, ['note']]")  # nothing is left of the first run


WRITE = """
found = []
for folder in ("", "/usr", "/dev", "/etc", sys.prefix, os.path.dirname(os.__file__)):
    try:
        open(folder + "/new", "w")
        found.append(folder)
    except OSError:
        pass
return found
"""


def test_all_else_is_read_only() -> None:
    returned(WRITE, "got == []")


DESCRIPTORS = """
found = []
for n in range(1024):
    try:
        found.append(os.fstat(n).st_mode >> 12)
    except OSError:
        pass
return found
"""


def test_no_descriptor_of_this_process_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "open").write_text("s3cret")
    with (tmp_path / "open").open() as stream:
        os.set_inheritable(stream.fileno(), True)
        returned(DESCRIPTORS, "got == [2, 2, 2, 12]")  # three times /dev/null, and the socket to the tests


SOCKETS = """
import socket
refused = []
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
    try:
        socket.socket(family)
    except PermissionError:
        refused.append(family)
return len(refused)
"""
CONNECT = """
import socket
try:
    socket.create_connection(("127.0.0.1", PORT), 2)
except OSError as error:
    return str(error)
"""


def test_no_network() -> None:
    returned(SOCKETS, "got == 4")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        returned(CONNECT.replace("PORT", str(listener.getsockname()[1])), "'not permitted' in got")
    returned("import asyncio\nasync def g(): return 2\nreturn asyncio.run(g())", "got == 2")  # a pair of sockets is no network


@pytest.mark.skipif(os.getuid() != 0, reason="only root may look at the namespaces of a jailed process")
def test_namespaces_are_its_own() -> None:
    """A second wall behind the refused calls, so it is looked at from outside."""
    mark = uuid.uuid4().hex
    run = threading.Thread(
        target=run_tests, args=(SLEEPER.replace("MARK", mark), "f()"), kwargs={"limits": Limits(wall_seconds=3)}
    )
    run.start()
    deadline = time.monotonic() + 30
    while not running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    (number,) = running(mark)
    for name in ("net", "pid", "mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{number}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{number}/status").read_text().splitlines())
    assert {name: int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == dict.fromkeys(
        ("CapEff", "CapPrm", "CapInh", "CapAmb"), 0
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "0" not in status["Uid"].split()
    run.join()


def test_no_rights() -> None:
    returned("return [os.getuid(), os.geteuid(), os.getgid()]", f"0 not in got and {os.getuid()} in (0, got[0])")
    calls = "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
    for call in (
        "ptrace(0, 0, 0, 0)",
        "unshare(0x10000000)",
        "mount(b'x', b'/tmp', b'tmpfs', 0, None)",
        "prctl(1, 0, 0, 0, 0)",
        "shmget(0, 4096, 0o1600)",
        "setuid(0)",
        "chroot(b'/tmp')",
        "sethostname(b'x', 1)",
    ):
        returned(calls + f"return [library.{call}, ctypes.get_errno()]", "got == [-1, 1]")
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    clone = f"library.syscall(ctypes.c_long({number}), ctypes.c_long(0x10000011), 0, 0, 0, 0)"
    returned(calls + f"return [{clone}, ctypes.get_errno()]", "got == [-1, 1]")


SLEEPER = """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", "MARK"])
"""
SURVIVOR = """
import time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", "MARK"])
    os._exit(0)
time.sleep(1)
return "/"
"""


def test_nothing_outlives_the_run() -> None:
    mark = uuid.uuid4().hex
    returned(SURVIVOR.replace("MARK", mark), "got == '/'")
    deadline = time.monotonic() + 10
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(mark) == []


def test_everything_ends_with_this_process() -> None:
    mark = uuid.uuid4().hex
    program = SLEEPER.replace("MARK", mark)
    code = f"from abba_cli.evaluation.sandbox import *\nrun_tests({program!r}, 'f()', limits=Limits(wall_seconds=300))"
    runner = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while len(running(mark)) < 2 and time.monotonic() < deadline:  # the runner's own command has the mark too
            time.sleep(0.05)
        assert len(running(mark)) >= 2, "the program has started"
    finally:
        runner.kill()
        runner.wait()
    deadline = time.monotonic() + 10
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(mark) == []
