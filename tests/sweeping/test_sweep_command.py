"""`abba sweep` as a user meets it: real runs in processes of their own, stops and kills at any place, and the report."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from models import write_model

Abba = Callable[..., tuple[int, str, str]]
RecipeFile = Callable[..., Path]
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def sweep_file(tiny_llama: Path, rows: Path, recipe_file: RecipeFile, tmp_path: Path) -> Path:
    """Two variants, of which one chooses its rate; OpenBookQA's form of questions."""
    base = write_model(tmp_path / "base", tiny_llama)
    recipe_file(
        model=f"{{name: {base}, dtype: float32}}",
        data=f"{{train: {rows}, eval: [{{path: {rows}, max_rows: 5}}], template: alpaca, max_length_tokens: 64}}",
    )
    data = tmp_path / "data" / "openbookqa"
    data.mkdir(parents=True)
    question = {"instruction": "Which? Answer1: a Answer2: b", "input": "", "output": "the correct answer is answer1"}
    data.joinpath("test.json").write_text(json.dumps([question | {"answer": f"answer{1 + place % 2}"} for place in range(6)]))
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"""
base: recipe.yaml
output: {tmp_path / "out"}
data_dir: {tmp_path / "data"}
variants:
  lora: {{set: {{adapter: {{method: lora, rank: 4}}}}}}
  abba: {{set: {{adapter: {{r1: 2, r2: 2}}}}}}
tune: {{values: {{training.learning_rate: [1.0e-2, 1.0e-5]}}, set: {{training.max_steps: 2}}}}
seeds: [1]
evaluate: {{tasks: [obqa], limit: 4}}
"""
    )
    return file


def start(file: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "abba_cli", "sweep", str(file), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | SETTINGS,
        # A shell that started the tests in the background has it ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def trainings(folder: Path) -> list[str]:
    """Command lines of the runs of a sweep that are alive."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "abba_cli.sweeping.child" in words and any(word.startswith(str(folder)) for word in words):
            found.append(" ".join(words))
    return found


@pytest.mark.slow
def test_it_tunes_trains_scores_and_reports(abba: Abba, sweep_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, shown, _ = abba("sweep", sweep_file, "--dry-run")
    assert code == 0
    assert "0 of 2" in shown
    assert "of rank 4" in shown
    assert not (out / "records").exists()
    process = start(sweep_file, "--parallel", "2")
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, said + errors
    assert "Lowest evaluation loss" in said
    table = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert sorted((row["name"], row["status"]) for row in table) == sorted(
        (name, "done")
        for name in (
            *(f"tuning/{variant}/learning_rate-{rate}" for variant in ("lora", "abba") for rate in ("0.01", "1e-05")),
            *("runs/lora/seed-1", "runs/abba/seed-1"),
        )
    )
    for row in table:
        if row["kind"] == "run":
            run = out / row["name"]
            tried = {
                one["training.learning_rate"]: float(one["eval_loss"])
                for one in table
                if one["label"] == row["label"] and one["kind"] == "tuning"
            }
            assert row["training.learning_rate"] == min(tried, key=lambda rate: tried[rate])
            outcome = json.loads((run / "provenance.json").read_text())["outcome"]
            assert float(row["eval_loss"]) == outcome["eval_loss"]
            results = json.loads((run / "eval" / "results.json").read_text())["results"]
            assert float(row["score:obqa"]) == results[0]["value"]
            assert results[0]["n"] == 4
    report = (out / "report.md").read_text()
    assert report.startswith("# sweep\n\n- Lowest evaluation loss: ")
    for name in ("score.png", "loss.png", "gradient-norm.png", "cost.png"):
        assert f"]({name})" in report
        assert (out / name).is_file()
    # Again: nothing is trained, and what is gone but recorded is not missed.
    before = {file: file.stat().st_mtime_ns for file in (out / "records").iterdir()}
    code, again, err = abba("sweep", sweep_file)
    assert (code, err) == (0, "")
    assert before == {file: file.stat().st_mtime_ns for file in (out / "records").iterdir()}
    assert again.splitlines()[-1] == said.splitlines()[-1]


@pytest.mark.slow
def test_a_diverged_run_is_told_and_the_others_are_made(sweep_file: Path, tmp_path: Path) -> None:
    text = sweep_file.read_text().partition("tune:")[0].replace("rank: 4}", "rank: 4}, training.learning_rate: 1.0e+30")
    sweep_file.write_text(text + "seeds: [1]\n")
    process = start(sweep_file, "--set", "training.max_grad_norm=0")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 1, said + errors
    assert "runs/lora/seed-1 failed: the " in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- runs/lora/seed-1 failed: the " in report
    assert "Lowest evaluation loss: abba" in report


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_goes_on(number: signal.Signals, abba: Abba, sweep_file: Path, tmp_path: Path) -> None:
    text = (
        sweep_file.read_text().partition("tune:")[0] + "seeds: [1]\nset: {training.max_steps: 60, checkpoints.every_steps: 20}\n"
    )
    sweep_file.write_text(text)
    out = tmp_path / "out"
    process = start(sweep_file)
    metrics = out / "runs" / "abba" / "seed-1" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.is_file() and '"step": 25,' in metrics.read_text()):
        assert time.monotonic() < until, process.communicate(timeout=5)
        time.sleep(0.05)
    first = (out / "records" / "runs--lora--seed-1.json").read_bytes()
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert "run the same command again to go on" in errors
    until = time.monotonic() + 60
    while trainings(out):
        assert time.monotonic() < until, "a run outlived its sweep"
        time.sleep(0.1)
    saved = max(int(path.name.rpartition("-")[2]) for path in (metrics.parent / "checkpoints").iterdir())
    assert saved >= 20
    again = start(sweep_file)
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0, said + errors
    assert first == (out / "records" / "runs--lora--seed-1.json").read_bytes(), "a finished run was made again"
    log = (out / "runs" / "abba" / "seed-1.log").read_text()
    assert f"after step {saved}" in log or f"step {saved + 1}/60" in log
    curve = json.loads((out / "records" / "runs--abba--seed-1.json").read_text())["curve"]
    assert [one["step"] for one in curve] == list(range(1, 61))


def test_messages(abba: Abba, sweep_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, _ = abba("sweep", sweep_file, "--report")
    assert code == 0
    assert "No run has ended yet." in said
    assert "that ended well: tuning/lora/learning_rate-0.01" in said.replace("\n", " ")
    (out / "records").mkdir(parents=True)
    (out / "records" / "tuning--lora--learning_rate-0.01.json").write_text("{")
    code, _, err = abba("sweep", sweep_file, "--report")
    assert code == 1
    assert err.startswith("abba: cannot read ")
    assert "remove it to run tuning/lora/learning_rate-0.01 again" in err
    code, _, err = abba("sweep", tmp_path / "none.yaml")
    assert (code, err) == (1, f"abba: cannot read the sweep {tmp_path / 'none.yaml'}: No such file or directory\n")
