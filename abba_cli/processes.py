"""The processes that work together: those that `abba train`, torchrun, accelerate or SLURM started, on GPUs or on a CPU."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState

from abba_cli.errors import AbbaError, LostContact, ToldByMain
from abba_cli.launching import LAUNCHED

Answer = TypeVar("Answer")

PATIENCE = timedelta(days=7)
"""Of a process that waits for slower ones; the default ends an evaluation after minutes."""

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl(2)


def join_processes() -> Any:
    """This process among the others; must be asked before anything else looks at accelerate's state."""
    if not torch.accelerator.is_available():
        # DeepSpeed, which accelerate imports where it is installed, warns otherwise.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Without being told, accelerate takes a process group on a machine without accelerator for a single process.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


@dataclass(frozen=True)
class Crew:
    """The processes of one training.

    Attributes:
        count: How many.
        index: This one's number; 0 is the main process, which alone writes and speaks.
        control: A gloo group for what is small and must not wait for a GPU; None for a single process.
    """

    count: int
    index: int
    control: Any

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.index == 0

    def from_main(self, make: Callable[[], Answer]) -> Answer:
        """Call `make` in the main process alone, and return what it returned in all of them.

        Raises:
            AbbaError: What `make` raised; in the other processes, ToldByMain in its place.
        """
        if self.count == 1:
            return make()
        told: list[Any] = [None, None]
        error: AbbaError | None = None
        if self.is_main:
            try:
                told = [make(), None]
            except AbbaError as caught:
                error, told = caught, [None, str(caught)]
        torch.distributed.broadcast_object_list(told, src=0, group=self.control)
        if error is not None:
            raise error
        if told[1] is not None:
            raise ToldByMain(told[1])
        return cast(Answer, told[0])

    def largest(self, value: int) -> int:
        """The largest of a number that each process has."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def wait(self) -> None:
        """Return when every process has come here."""
        self.largest(0)

    def leave(self) -> None:
        """End the work together; NCCL complains at the end of a process that has not."""
        if self.count > 1:
            torch.distributed.destroy_process_group()

    @contextmanager
    def in_contact(self) -> Iterator[None]:
        """Turn what gloo and NCCL raise when another process has gone into one clear error.

        Raises:
            LostContact: In place of it.
        """
        try:
            yield
        except RuntimeError as error:
            gone = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
            if self.count == 1 or not gone:
                raise
            raise LostContact(
                "another process of the run has ended; run the same command again to go on from the last checkpoint"
            ) from error


@lru_cache(maxsize=1)
def join_crew() -> Crew:
    """Join the other processes of this training; with none, a crew of one."""
    state = join_processes()
    if state.num_processes == 1:
        return Crew(1, 0, None)
    if LAUNCHED in os.environ:
        _end_with_launcher()
    return Crew(state.num_processes, state.process_index, torch.distributed.new_group(backend="gloo", timeout=PATIENCE))


def _end_with_launcher() -> None:
    """Have this process asked to stop when our launcher dies without a word: nobody else would, and it holds the run's lock.

    Not under other launchers: Linux sends the signal when the thread that started the process ends, which may mean nothing there.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
