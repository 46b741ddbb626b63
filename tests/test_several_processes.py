"""One run in several real processes: the same steps as in one, stops and kills that lose nothing, errors told once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from abba_cli import RunDir, train

RecipeFile = Callable[..., Path]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS, SHORT = 120, 12
PAIR = {
    "adapter": "{r1: 4, r2: 3, alpha: 4}",
    "training": f"{{max_steps: {STEPS}, batch_size: 2, learning_rate: 1e-2, scheduler: constant, warmup_ratio: 0}}",
    "checkpoints": "{every_steps: 4, keep: 40}",
}


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def ended(command: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = command.communicate(timeout=300)
    return command.returncode, out, err


def abba_pair(recipe: Path, *arguments: object) -> "subprocess.Popen[str]":
    return start("abba_cli", "train", recipe, "--num-processes", 2, *arguments)


def wait_for_step(run: Path, step: int, command: "subprocess.Popen[str]") -> None:
    while len(RunDir(run).metrics()) < step:
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)


def workers(command: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes that train, in the order of their ranks."""
    # For a moment, a process that is being started still has the command and the environment of its launcher.
    found = {child: child.environ().get("RANK") for child in psutil.Process(command.pid).children()}
    return sorted((child for child, rank in found.items() if rank is not None), key=lambda child: int(found[child] or 0))


def factors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """How far two adapters are from each other, as a norm over all factors."""
    assert a.keys() == b.keys()
    return float(torch.stack([(a[name] - b[name]).norm() for name in a]).norm())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair") / "whole"


@pytest.fixture
def undisturbed(whole: Path, recipe_file: RecipeFile) -> Path:
    """A run in two processes, made once, that nothing happened to."""
    if not whole.exists():
        code, out, err = ended(abba_pair(recipe_file(**PAIR, output=str(whole))))
        assert (code, err) == (0, "")
        assert out.count("Finished after") == 1
    return whole


# The sums of other numbers of processes are rounded otherwise. AdamW makes a whole step of any gradient, so that one which is
# nothing but rounding moves its element all the same: what is compared are all elements, with the way that they have gone.
ROUNDING = 5e-3


def test_two_processes_make_the_steps_of_one(undisturbed: Path, recipe_file: RecipeFile) -> None:
    one = train(recipe_file(**PAIR), ["training.batch_size=4", f"training.max_steps={SHORT}"])
    pair = RunDir(undisturbed)
    for key, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-3)):
        found = [[row[key] for row in run.metrics()[:SHORT]] for run in (one, pair)]
        assert found[0] == pytest.approx(found[1], rel=tolerance)
    early, end = (factors(undisturbed / "checkpoints" / f"checkpoint-{step}") for step in (4, SHORT))
    assert apart(factors(one.path), end) < ROUNDING * apart(early, end)
    records = [run.provenance() for run in (one, pair)]
    assert [record["processes"] for record in records] == [1, 2]
    assert [record["rows_per_step"] for record in records] == [4, 4]
    assert [row["tokens"] for row in one.metrics()] == [row["tokens"] for row in pair.metrics()[:SHORT]]


def test_a_run_goes_on_with_fewer_and_with_more_processes(undisturbed: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = recipe_file(**PAIR)
    assert ended(abba_pair(recipe, "--set", "training.max_steps=4"))[0] == 0
    shutil.copytree(tmp_path / "run", tmp_path / "with-four")
    alone = train(recipe, [f"training.max_steps={SHORT}"])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 4, "-m", "abba_cli", "train", recipe]
    more = ["--set", f"output={tmp_path / 'with-four'}", "--set", f"training.max_steps={SHORT}"]
    code, _, err = ended(start(*torchrun, *more))
    assert code == 0, err
    early, end = (factors(undisturbed / "checkpoints" / f"checkpoint-{step}") for step in (4, SHORT))
    for run in (alone, RunDir(tmp_path / "with-four")):
        assert run.provenance()["rows_per_step"] == 4
        assert [row["step"] for row in run.metrics()] == list(range(1, SHORT + 1))
        assert apart(factors(run.path), end) < ROUNDING * apart(early, end)


def test_a_batch_that_the_user_shares_out_is_the_same_run(undisturbed: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    """Batch 4 in one process, then 2 in each of two, then 4 in one again; none of them warns of it."""
    recipe = recipe_file(**PAIR)
    train(recipe, ["training.batch_size=4", "training.max_steps=4"])
    assert ended(abba_pair(recipe, "--set", f"training.max_steps={SHORT}"))[::2] == (0, "")
    early, end = (factors(undisturbed / "checkpoints" / f"checkpoint-{step}") for step in (4, SHORT))
    assert apart(factors(tmp_path / "run"), end) < ROUNDING * apart(early, end)
    run = train(recipe, ["training.batch_size=4", f"training.max_steps={SHORT + 1}"])
    assert run.provenance()["rows_per_step"] == 4
    assert [row["step"] for row in run.metrics()] == list(range(1, SHORT + 2))


def test_rows_that_cannot_be_shared_evenly_are_refused(undisturbed: Path, recipe_file: RecipeFile) -> None:
    recipe = recipe_file(**PAIR, output=str(undisturbed))
    command = start("abba_cli", "train", recipe, "--num-processes", 3, "--set", "training.max_steps=130")
    code, _, err = ended(command)
    assert code == 1
    assert err.splitlines()[-1].startswith("abba: the run in")
    assert "takes 4 rows in an optimizer step, which 3 processes cannot share evenly" in err


def test_an_error_is_told_once(recipe_file: RecipeFile, tmp_path: Path) -> None:
    code, _, err = ended(abba_pair(recipe_file(**PAIR, data=f"{{train: {tmp_path / 'none.jsonl'}}}")))
    assert code == 1
    assert [line for line in err.splitlines() if line.strip()] == [err.strip()]
    assert err.startswith("abba: ")
    assert "none.jsonl" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_pair_saves_and_goes_on_to_the_same_weights(
    number: signal.Signals, undisturbed: Path, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    recipe = recipe_file(**PAIR)
    command = abba_pair(recipe)
    wait_for_step(tmp_path / "run", 50, command)
    command.send_signal(number)
    code, _, err = ended(command)
    assert code == 128 + number
    assert err.startswith("stopped after step ")
    assert err.count("\n") == 1
    assert len(RunDir(tmp_path / "run").metrics()) < STEPS
    assert ended(abba_pair(recipe))[0] == 0
    assert same(factors(tmp_path / "run"), factors(undisturbed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_the_first_step_is_told_once(number: signal.Signals, recipe_file: RecipeFile, tmp_path: Path) -> None:
    """While the processes still import their libraries, and cannot say anything themselves."""
    command = abba_pair(recipe_file(**PAIR))
    while len(workers(command)) < 2:
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)
    started = workers(command)
    command.send_signal(number)
    code, _, err = ended(command)
    assert code == 128 + number
    assert err == f"abba: stopped by {number.name}; every checkpoint is kept, run the same command again to go on\n"
    assert not any(one.is_running() for one in started)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_pair_of_which_one_is_killed_goes_on_to_the_same_weights(
    victim: int, undisturbed: Path, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    recipe = recipe_file(**PAIR)
    command = abba_pair(recipe)
    wait_for_step(tmp_path / "run", 50, command)
    workers(command)[victim].kill()
    code, _, err = ended(command)
    assert code == 1
    assert f"process {victim} of 2 was ended by SIGKILL" in err
    assert "Traceback" not in err
    assert ended(abba_pair(recipe))[0] == 0
    assert same(factors(tmp_path / "run"), factors(undisturbed))


def test_processes_stop_when_their_launcher_is_killed(recipe_file: RecipeFile, tmp_path: Path) -> None:
    command = abba_pair(recipe_file(), "--set", "training.max_steps=100000")
    wait_for_step(tmp_path / "run", 5, command)
    orphans = workers(command)
    assert len(orphans) == 2
    command.kill()
    command.communicate()
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert not alive
    assert RunDir(tmp_path / "run").complete_checkpoints()
