"""The recipe of the fault suite, a run that nothing happened to, and the count of what was broken."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from breaking import at_step, die, record
from running import EVERY, SECTIONS, STARTED, STEPS, bytes_lost, check_same_end, goes_on, start

from abba_cli import RunDir, __version__

REPORT = Path(__file__).parents[2] / "benchmarks" / "results" / "faults-cpu.json"
COUNT = os.environ.get("ABBA_FAULTS")


@dataclass
class Tally:
    """What came of one kind of fault."""

    injected: int = 0
    survived: int = 0
    steps_lost: int = 0
    most_steps_lost: int = 0
    bytes_lost: int = 0

    def add(self, steps_lost: int = 0) -> None:
        """Count a fault that has just been injected."""
        self.injected += 1
        self.steps_lost += steps_lost
        self.most_steps_lost = max(self.most_steps_lost, steps_lost)

    def compare(self, run: RunDir, whole: RunDir) -> None:
        """Compare what has become of the broken run with one that nothing happened to."""
        self.bytes_lost += bytes_lost(run, whole)
        check_same_end(run, whole)


class Faults(dict[str, Tally]):
    """Tallies by kind."""

    @contextmanager
    def of(self, kind: str) -> Iterator[Tally]:
        """Faults that have all been survived if the body ends without an error."""
        tally = self.setdefault(kind, Tally())
        before = tally.injected
        yield tally
        tally.survived += tally.injected - before


FAULTS = Faults()


@pytest.fixture(scope="session")
def faults() -> Faults:
    return FAULTS


@pytest.fixture(scope="session")
def many() -> int | None:
    """How many random faults the long form asks for; None in the short form."""
    return int(COUNT) if COUNT else None


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Start the server of which the trainings are forks, with one thread, as two may add in another order."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    forkserver.ensure_running()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    """End what a test that failed has left, also if it stands still: pytest would wait for it at its end."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.join()


@pytest.fixture
def recipe(recipe_file: Callable[..., Path], rows: Path) -> Path:
    return recipe_file(**SECTIONS, data=f"{{train: {rows}, eval: {rows}, template: chat, max_length_tokens: 64}}")


@pytest.fixture(scope="session")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def undisturbed(_kept: Path, recipe: Path) -> RunDir:
    """A run that nothing happened to, made once."""
    run = RunDir(_kept / "whole")
    if not run.path.exists():
        began = time.monotonic()
        goes_on(recipe, f"output={run.path}", before=partial(record, run.path, _kept / "operations.txt"))
        (_kept / "seconds.txt").write_text(str(time.monotonic() - began))
    return run


@pytest.fixture
def seconds(undisturbed: RunDir, _kept: Path) -> float:
    """What that run took from its start to its end."""
    return float((_kept / "seconds.txt").read_text())


@pytest.fixture
def operations(undisturbed: RunDir, _kept: Path) -> int:
    """How many file operations that run has made in its folder, as far as Python tells of them."""
    count = len((_kept / "operations.txt").read_text().splitlines())
    assert count > 100
    return count


@pytest.fixture
def halted(_kept: Path, recipe: Path, tmp_path: Path) -> RunDir:
    """A run that was killed after step 18, with checkpoints after 12 and 16; each test has a copy as the recipe's output."""
    if not (_kept / "halted").exists():
        training = start(recipe, f"output={_kept / 'halted'}", before=partial(at_step, 18, die))
        assert training.ended() == -9
    shutil.copytree(_kept / "halted", tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here, which takes root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True, timeout=20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the count, and write it down in the long form."""
    if not FAULTS:
        return
    total = {
        key: sum(getattr(tally, key) for tally in FAULTS.values()) for key in ("injected", "survived", "steps_lost", "bytes_lost")
    }
    most = max(tally.most_steps_lost for tally in FAULTS.values())
    terminalreporter.write_sep("=", "faults")
    for kind, tally in FAULTS.items():
        terminalreporter.write_line(f"{kind}: survived {tally.survived} of {tally.injected}, steps lost {tally.steps_lost}")
    terminalreporter.write_line(
        f"faults: survived {total['survived']} of {total['injected']} injected; steps lost {total['steps_lost']} "
        f"(at most {most} at once); bytes lost {total['bytes_lost']}"
    )
    if COUNT:
        record = {"kinds": {kind: asdict(tally) for kind, tally in FAULTS.items()}, **total, "most_steps_lost_at_once": most}
        record |= {"steps": STEPS, "every_steps": EVERY, "random_moments": int(COUNT)}
        record |= {"abba": __version__, "torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
        REPORT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
