"""The harness in processes of its own: one that is killed in the middle, and two that share the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness_rows import arc_rows, gsm8k_rows, write_rows, write_tokenizer
from models import write_model

pytest.importorskip("lm_eval")

SCORE = """
import json, os, sys, time
from dataclasses import asdict
from pathlib import Path
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = json.loads(sys.argv[1])
from accelerate import PartialState
assert PartialState(cpu="RANK" in os.environ).num_processes == int(os.environ.get("WORLD_SIZE", "1"))
from harness_rows import load_speaker, settings
from abba_cli.evaluation.harness import model as harness_model
from abba_cli.evaluation.harness.scoring import score_with_harness

model, data, cache, out, wait = sys.argv[2:]
computed = 0
keep = harness_model.AskedModel._keep

def counting(self, *answer):
    global computed
    computed += 1
    keep(self, *answer)
    time.sleep(float(wait))

harness_model.AskedModel._keep = counting
scores = score_with_harness(load_speaker(Path(model)), ["arc_c", "gsm8k"], **settings(Path(cache), Path(data)))
rank = os.environ.get("RANK", "0")
found = json.dumps([computed, [asdict(score) for score in scores]], default=lambda example: example.model_dump())
Path(out, f"{rank}.json").write_text(found)
"""
ROWS = 24


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("harness")
    write_model(folder / "llama", write_tokenizer(folder / "tokenizer"))
    write_rows(folder / "data" / "ARC-Challenge", "test", arc_rows(ROWS))
    write_rows(folder / "data" / "gsm8k", "test", gsm8k_rows(3))
    (folder / "score.py").write_text(SCORE)
    here = Path(__file__).parent
    return [str(folder / "score.py"), json.dumps([str(here), str(here.parent)]), str(folder / "llama"), str(folder / "data")]


def run(command: list[str], out: Path) -> list[Any]:
    """Each process's number of answers that it computed, and its scores."""
    out.mkdir()
    process = subprocess.Popen([*command[:-1], str(out), command[-1]], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]
    return [json.loads(file.read_text()) for file in sorted(out.iterdir())]


@pytest.fixture(scope="module")
def whole(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("whole")
    [found] = run([sys.executable, *given, str(folder / "cache"), "0"], folder / "out")
    assert found[0] > 3 * ROWS
    return list(found)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(given: list[str], whole: list[Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    # Slowed down, so that there is a middle to kill it in.
    process = subprocess.Popen([sys.executable, *given, str(cache), str(tmp_path), "0.05"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while len(answers(cache)) < 20:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = len(answers(cache))
    assert 20 <= before < whole[0]
    [file] = cache.iterdir()
    with file.open("a") as stream:
        stream.write('["half a li')

    computed, scores = run([sys.executable, *given, str(cache), "0"], tmp_path / "out")[0]
    assert computed == whole[0] - before
    assert scores == whole[1]


@pytest.mark.slow
def test_two_processes_share_the_rows_and_agree(given: list[str], whole: list[Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    first, second = run([*launch, *given, str(cache), "0"], tmp_path / "two")
    assert first[1] == second[1] == whole[1]
    assert first[0] + second[0] == whole[0]
    assert abs(first[0] - second[0]) <= 8
    assert len(list(cache.iterdir())) == 2
    # Answers that two computed serve one.
    [alone] = run([sys.executable, *given, str(cache), "0"], tmp_path / "one")
    assert alone == [0, whole[1]]


def answers(cache: Path) -> list[str]:
    return [line for file in cache.glob("*.jsonl") for line in file.read_text().splitlines() if line]
