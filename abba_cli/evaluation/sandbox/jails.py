"""Starting and ending the jailed processes, from outside."""

import json
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from abba_cli.evaluation.sandbox.contract import Limits

_START = "import sys; sys.path.insert(0, sys.argv[1]); from inside.start import main; main()"


@dataclass(frozen=True)
class Jailed:
    """What one jailed process is told."""

    role: Literal["program", "tests", "probe"]
    text: str
    """The program, or its tests."""
    link: int | None
    """Descriptor of its end of the link."""
    report: int | None
    """Descriptor that takes the verdict."""


def start(jailed: Jailed, limits: Limits, weaker: bool, home: str) -> subprocess.Popen[bytes]:
    """Start a fresh interpreter that shuts itself in: no fork of this process, whose threads and devices would come along.

    Args:
        jailed: What it is told.
        limits: Of it.
        weaker: Go on where protections are missing.
        home: Its folder, where it cannot have a file system of its own.
    """
    settings = {
        "role": jailed.role,
        "text": jailed.text,
        "link": jailed.link,
        "report": jailed.report,
        "weaker": weaker,
        "parent": os.getpid(),
        "visible": _python_folders(),
        "packages": _packages(),
        "environment": _environment(),
        "most_bytes": limits.output_bytes,
        "bounds": {
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "processes": limits.processes,
            "file_bytes": limits.file_bytes,
        },
    }
    # The loader of an interpreter built with shared libraries may need this to find them; it is gone before any program runs.
    loader = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    with tempfile.TemporaryFile() as stream:  # a file, not a pipe: nothing here waits for the process to read
        stream.write(json.dumps(settings).encode("ascii"))
        stream.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-c", _START, str(Path(__file__).parent)],
            stdin=stream,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[end for end in (jailed.link, jailed.report) if end is not None],
            env={**_environment(), **loader},
            cwd=home,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> int:
    """Kill it and with it all that it has started; returns its exit status."""
    process.kill()
    return process.wait()


def _environment() -> dict[str, str]:
    # A fixed seed: a program whose answer depends on the order of a set of strings gets the same verdict each time.
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return {"PATH": path, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _packages() -> list[str]:
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def _python_folders() -> list[str]:
    """Where Python lies, as named and as resolved."""
    named = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib"), *_packages()]
    return sorted({form for folder in named for form in (os.path.abspath(folder), os.path.realpath(folder))} - {"/"})
