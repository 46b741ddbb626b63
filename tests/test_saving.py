"""The time that saving takes is measured and told; records of runs from before that are still read."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import OUTCOME as OLD
from rich.console import Console

from abba_cli import recorder, train
from abba_cli.events import Finished
from abba_cli.records import Outcome
from abba_cli.ui.training import show_summary


def summary(outcome: Outcome) -> str:
    stream = io.StringIO()
    show_summary(Console(file=stream, width=120), Finished(Path("out/mine"), False, outcome))
    return stream.getvalue()


def test_the_summary_tells_it_where_it_is_known() -> None:
    assert "saving took 2.0 s, 2.5% of the time\n" in summary(Outcome(**OLD | {"seconds": 80.0}, saving_seconds=2.0))
    assert "saving took 0.2 s\n" in summary(Outcome(**OLD, saving_seconds=0.2))  # of 8 s: the share would tell nothing
    assert "saving" not in summary(Outcome(**OLD))


def test_saving_is_measured_and_evaluation_is_not(
    recipe_file: Callable[..., Path], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that stands still but for a save, which takes 2 s, and a batch of an evaluation, which takes 50 s."""
    seal, on_prediction_step = recorder.seal_checkpoint, recorder.Recorder.on_prediction_step
    now = [1000.0]

    def slow_seal(checkpoint: Path) -> None:
        now[0] += 2
        seal(checkpoint)

    def slow_evaluation(*given: Any, **named: Any) -> None:
        now[0] += 50
        on_prediction_step(*given, **named)

    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=time.process_time))
    monkeypatch.setattr(recorder, "seal_checkpoint", slow_seal)
    monkeypatch.setattr(recorder.Recorder, "on_prediction_step", slow_evaluation)
    run = train(recipe_file(), [f"data.eval={rows}", "evaluation.every_steps=2"])
    assert now[0] == 1000 + 3 * 2 + 4 * 12 * 50
    assert [row["saving_seconds"] for row in run.metrics() if "saving_seconds" in row] == [0, 0, 2, 2, 4, 4]


def test_the_processor_s_time_goes_on_over_starts(recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [7.0]

    def next_second() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=time.perf_counter, process_time=next_second))
    train(recipe_file(), ["training.max_steps=2"])
    now[0] = 100.0
    run = train(recipe_file(), ["training.max_steps=4"])
    assert [row["processor_seconds"] for row in run.metrics() if "loss" in row] == [1, 2, 3, 4]


def test_an_older_record_is_read(recipe_file: Callable[..., Path], abba: Callable[..., tuple[int, str, str]]) -> None:
    run = train(recipe_file())
    record = run.provenance()
    record["outcome"] = {key: value for key, value in record["outcome"].items() if key != "saving_seconds"}
    run.provenance_file.write_text(json.dumps(record))
    code, out, err = abba("train", recipe_file())
    assert (code, err) == (0, "")
    assert "has finished already" in " ".join(out.split())
