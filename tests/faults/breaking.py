"""What is done to a training from within its own process, before or while it runs."""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def die() -> None:
    """End this process as SIGKILL, the kernel's memory killer or a power cut do: at once, and without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, action: Callable[[], object]) -> None:
    """Have something happen at the end of an optimizer step."""
    from abba_cli.recorder import Recorder

    on_step_end: Any = Recorder.on_step_end

    def broken(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == step:
            action()
        on_step_end(self, args, state, control, **given)

    Recorder.on_step_end = broken  # type: ignore[method-assign]


def at_operation(folder: Path, action: Callable[[str], object]) -> None:
    """Call `action` before each of Python's own file operations in a folder that changes something, with a name for it."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS or (event == "open" and arguments[2] & _WRITING):
            names = [os.fspath(one) for one in arguments if isinstance(one, str | Path)]
            # A tree is removed by names relative to an open folder.
            if any(name.startswith(str(folder)) for name in names) or event in ("os.remove", "os.rmdir"):
                action(f"{event} {' '.join(names)}")

    sys.addaudithook(hook)


def die_at(folder: Path, number: int) -> None:
    """Die before the given file operation, counted from 1."""
    left = [number]

    def count(_: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            die()

    at_operation(folder, count)


def die_before(folder: Path, operation: str, occurrence: int = 1) -> None:
    """Die before a file operation whose name ends so."""
    left = [occurrence]

    def look(name: str) -> None:
        if name.endswith(operation):
            left[0] -= 1
            if left[0] == 0:
                die()

    at_operation(folder, look)


def record(folder: Path, file: Path) -> None:
    """Write down every file operation."""
    stream = file.open("w", buffering=1)
    at_operation(folder, lambda name: stream.write(name + "\n"))


def stop_before(folder: Path, operation: str) -> None:
    """Have this process stand still before a file operation whose name ends so, until it gets SIGCONT."""

    def look(name: str) -> None:
        if name.endswith(operation):
            os.kill(os.getpid(), signal.SIGSTOP)

    at_operation(folder, look)


def spoil_losses(step: int, factor: float) -> None:
    """Multiply the loss of one step by a number that is none, as a bit that flips in memory may."""
    from abba_cli.loop import AbbaTrainer

    compute_loss = AbbaTrainer.compute_loss

    def broken(self: AbbaTrainer, *given: Any, **named: Any) -> Any:
        loss = compute_loss(self, *given, **named)
        return loss * factor if self.state.global_step == step - 1 else loss

    AbbaTrainer.compute_loss = broken  # type: ignore[method-assign]


def signal_in_evaluation(step: int) -> None:
    """Have SIGTERM come while the evaluation after a step is under way."""
    from abba_cli.recorder import Recorder

    on_prediction_step: Any = Recorder.on_prediction_step

    def broken(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == step and self.signal_number is None:
            os.kill(os.getpid(), signal.SIGTERM)
        on_prediction_step(self, args, state, control, **given)

    Recorder.on_prediction_step = broken  # type: ignore[method-assign]


def shift_clock(jumps: dict[int, float]) -> None:
    """Have the wall clock jump by so many seconds after each of these steps."""
    import time

    true_time, true_time_ns = time.time, time.time_ns
    shift = [0.0]
    time.time = lambda: true_time() + shift[0]
    time.time_ns = lambda: true_time_ns() + int(shift[0] * 1e9)
    for step, seconds in jumps.items():
        at_step(step, partial(shift.__setitem__, 0, seconds))


def allocate_too_much(device: str) -> None:
    """Ask torch's allocator for more than there is; for a GPU's, raise what it raises."""
    import torch

    if device == "cpu":
        torch.empty(1 << 50)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB")
