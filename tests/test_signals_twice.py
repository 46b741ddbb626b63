"""A signal asks for a stop once, however often it comes at first; only later is it impatience."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from abba_cli import RunDir, recorder
from abba_cli.cli import _was_interrupted
from abba_cli.errors import TrainingInterrupted
from abba_cli.processes import Crew
from abba_cli.recipe_file import load_recipe


def test_an_echo_of_a_signal_is_no_second_one(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, heard = [100.0], list[object]()
    monkeypatch.setattr(recorder.time, "monotonic", lambda: now[0])
    watched = recorder.Recorder(load_recipe(recipe_file()), RunDir(tmp_path / "run"), Crew(1, 0, None), heard.append)
    with watched.signals():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 0.3
        assert (watched.signal_number, len(heard)) == (signal.SIGTERM, 1)
        now[0] += 1
        with pytest.raises(TrainingInterrupted, match="ended at once"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_another_process_told_of_first_is_no_second_one(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = recorder.Recorder(load_recipe(recipe_file()), RunDir(tmp_path / "run"), Crew(1, 0, None), lambda event: None)
    watched.signal_number = signal.SIGTERM  # as `Crew.largest` brings it
    with watched.signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert watched.signal_number == signal.SIGTERM


def test_a_signal_while_the_processes_ask_one_another_is_not_lost(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    class Asking(Crew):
        def largest(self, value: int) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return value  # what this process had said before it came

    watched = recorder.Recorder(load_recipe(recipe_file()), RunDir(tmp_path / "run"), Asking(1, 0, None), lambda event: None)
    stops = []
    with watched.signals():
        for _ in range(2):
            control = TrainerControl()
            watched.on_step_end(TrainingArguments(output_dir=str(tmp_path), report_to=[]), TrainerState(), control)
            stops.append((control.should_training_stop, control.should_save))
    assert stops == [(False, False), (True, True)]


def test_an_interrupted_import_is_known() -> None:
    error = ModuleNotFoundError("could not import module 'BloomModel'")
    error.__cause__ = ValueError()
    error.__cause__.__context__ = KeyboardInterrupt()
    assert _was_interrupted(error)
    assert not _was_interrupted(ModuleNotFoundError("no module named 'x'"))
