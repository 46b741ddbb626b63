"""`abba eval` as it is typed: real processes, killed and gone on with, several of them, and what it says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from abba_cli import train

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tiny_llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs under out/, the alpaca one newer, and data/ with 40 questions of two tasks each."""
    folder = tmp_path_factory.mktemp("place")
    for name, template in (("older", "chat"), ("newest", "alpaca")):
        recipe = folder / f"{name}.yaml"
        recipe.write_text(
            f"model: {{name: {tiny_llama}, dtype: float32}}\n"
            "adapter: {r1: 4, r2: 3, alpha: 8}\n"
            f"data: {{train: {rows}, template: {template}, max_length_tokens: 64}}\n"
            "training: {max_steps: 4, batch_size: 4, learning_rate: 5e-2}\n"
            f"output: {folder / 'out' / name}\n"
        )
        train(recipe)
    os.utime(folder / "out" / "older" / "provenance.json", (1, 1))
    made = {
        "ARC-Challenge": [{"instruction": f"{n}?", "answer": f"answer{n % 4 + 1}", "output": "", "input": ""} for n in range(40)],
        "boolq": [{"instruction": f"Is {n} odd?", "answer": "true" if n % 2 else "false", "output": ""} for n in range(40)],
    }
    for name, questions in made.items():
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "test.json").write_text(json.dumps(questions))
    return folder


def abba(place: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "abba_cli", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240, env={**ENVIRONMENT, **variables})


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_as_typed_it_takes_the_newest_run_and_says_which(place: Path) -> None:
    done = abba(place, "eval", "--tasks", "arc_c,boolq", "--data-dir", "data")
    assert done.returncode == 0, done.stderr
    assert "scoring out/newest, the newest finished run there" in done.stdout
    results = json.loads((place / "out" / "newest" / "eval" / "results.json").read_text())
    assert [(one["task"], one["n"], one["protocol"]) for one in results["results"]] == [
        ("arc_c", 40, "paper"),
        ("boolq", 40, "paper"),
    ]
    assert results["models"][0]["template"] == "alpaca"
    assert "### Response:" in samples(place / "out" / "newest" / "eval")[0]["prompt"]
    table = (place / "out" / "newest" / "eval" / "results.md").read_text()
    assert "| arc_c |" in table
    assert "| boolq |" in table
    assert re.search(r"arc_c +paper +40 ", done.stdout)
    assert "Traceback" not in done.stderr


def test_killed_and_started_again_it_goes_on_to_the_same_answers(place: Path, tmp_path: Path) -> None:
    command = ["eval", "out/newest", "--tasks", "arc_c,boolq", "--data-dir", "data", "--batch-size", "4"]
    assert abba(place, *command, "--output", str(tmp_path / "whole")).returncode == 0
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "abba_cli", *command, "--output", str(stopped)], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (stopped / "samples.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with (stopped / "samples.jsonl").open("a") as stream:
        stream.write('{"key": "cut sh')  # what a kill in the middle of a write leaves
    before = len(samples_whole(stopped))
    assert 0 < before < 80
    done = abba(place, *command, "--output", str(stopped))
    assert done.returncode == 0, done.stderr
    assert key_and_answer(samples(stopped)) == key_and_answer(samples(tmp_path / "whole"))
    whole, gone_on = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("whole", "stopped"))
    assert gone_on == whole


def samples_whole(folder: Path) -> list[str]:
    return [line for line in (folder / "samples.jsonl").read_text().splitlines() if line.endswith("}")]


def key_and_answer(rows: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    return {row["key"]: (row["response"], row["score"]) for row in rows}


def test_processes_share_the_rows(place: Path, tmp_path: Path) -> None:
    command = ["eval", "out/newest", "--tasks", "arc_c,boolq", "--data-dir", "data", "--batch-size", "4"]
    assert abba(place, *command, "--output", str(tmp_path / "one")).returncode == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "abba_cli"]
    launch += [*command, "--output", str(tmp_path / "two")]
    done = subprocess.run(launch, cwd=place, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results.json, results.md") == 1
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two"))
    assert two == one
    assert json.loads((tmp_path / "two" / "results.json").read_text())["settings"]["processes"] == 2
    assert key_and_answer(samples(tmp_path / "two")) == key_and_answer(samples(tmp_path / "one"))
    assert not list((tmp_path / "two").glob("samples.rank*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "name some, such as --tasks arc_c,boolq; --list shows them"),
        (("--tasks", "arc_challange"), 1, "abba: there is no task arc_challange; did you mean arc_c?"),
        (("--tasks", "piqa", "--data-dir", "data"), 1, "Put the file at DIR/piqa/test.jsonl and give --data-dir DIR"),
        (("--tasks", "humaneval"), 1, "give --allow-code-execution to run them in a sandbox"),
        (("no/run", "--tasks", "arc_c", "--data-dir", "data"), 1, "no/run"),
        (("out/newest", "--model", "x", "--tasks", "arc_c"), 2, "name one of RUN, --adapter and --model"),
        (("--tasks", "arc_c", "--top-p", "0.5"), 2, "--top-p needs a --temperature"),
        (("--tasks", "arc_c", "--batch-size", "many"), 2, "'many' is no batch size; expected auto or a number of at least 1"),
        (("--tasks", "arc_c", "--protocol", "harness", "--samples", "3"), 1, "--samples goes with --protocol paper"),
        (("--tasks", "arc_c", "--backend", "vllm", "--data-dir", "data"), 1, "vllm is not installed"),
    ],
)
def test_mistakes_are_one_clear_line(place: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = abba(place, "eval", *arguments, COLUMNS="300")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in " ".join(done.stderr.split())


def test_two_evaluations_of_one_folder_do_not_mix(place: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        done = abba(place, "eval", "out/newest", "--tasks", "boolq", "--data-dir", "data", "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "another evaluation is writing to" in done.stderr


def test_the_list_names_every_task(place: Path) -> None:
    done = abba(place, "eval", "--list")
    assert done.returncode == 0
    for name in ("arc_c", "hellaswag", "math500", "humaneval_plus", "mbpp_plus"):
        assert re.search(rf"^  {name} +[\d,]+ +(accuracy|pass@k) ", done.stdout, re.MULTILINE)
