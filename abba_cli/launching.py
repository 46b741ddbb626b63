"""Starting one `abba train` on several devices: a process for each, through the agent behind torchrun.

`accelerate launch` starts the same agent on GPUs, and a single process on a CPU, where it counts on MPI; so the agent is started
here without that step. Accelerate then finds its place in the environment that the agent sets, as in any program under torchrun.
"""

import logging
import os
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import typer

from abba_cli.errors import RunError

LAUNCHED = "ABBA_LAUNCHED"
"""Environment variable of the processes that `launch` has started: a file that is empty until they have told of a stop."""

PATIENCE_SECONDS = 120.0
"""For the address of machine 0 to become known: that of a pod is so only some time after it has started."""

_PORT = 29500  # torchrun's own default


class Launcher(StrEnum):
    """Who starts the processes."""

    auto = "auto"
    none = "none"


@dataclass(frozen=True)
class Layout:
    """Which processes train together.

    Attributes:
        processes: On this machine.
        machines: In all.
        rank: This machine's number.
        address: HOST:PORT of machine 0, where there are several.
    """

    processes: int
    machines: int = 1
    rank: int = 0
    address: str | None = None

    @property
    def count(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines


def wanted_layout(processes: int | None, machines: int, rank: int, address: str | None) -> Layout:
    """Which processes a command line asks for; one for each GPU where it says nothing.

    Raises:
        typer.BadParameter: The options contradict one another.
    """
    if machines > 1 and address is None:
        raise typer.BadParameter("--num-machines needs --main-address HOST:PORT of the machine with --machine-rank 0")
    if not 0 <= rank < machines:
        raise typer.BadParameter(f"--machine-rank {rank} is not one of {machines} machines: expected 0 to {machines - 1}")
    if address is not None and not address.rpartition(":")[2].isdigit():
        address = f"{address}:{_PORT}"
    if address is not None and int(address.rpartition(":")[2]) > 65535:
        raise typer.BadParameter(f"--main-address {address}: expected a port up to 65535")
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    return Layout(processes, machines, rank, address)


def is_launched() -> bool:
    """Whether something has started this process as one of several."""
    return "RANK" in os.environ


def take_place_from_slurm() -> None:
    """Under `srun` without torchrun, give accelerate the names that it looks for, in a job that sets MASTER_ADDR."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    if not is_launched() and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "MASTER_ADDR" in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in names.items()})
        os.environ.setdefault("MASTER_PORT", str(_PORT))


def launch(arguments: Sequence[str], layout: Layout) -> int:
    """Run `abba ARGUMENTS` in every process of the layout, and wait for them.

    Returns:
        The exit code for this machine.

    Raises:
        RunError: Machine 0 is not reached.
    """
    with tempfile.NamedTemporaryFile(prefix="abba-") as told, _stops() as stops:
        os.environ[LAUNCHED] = told.name
        try:
            return _run_agent(arguments, layout, stops)
        except KeyboardInterrupt:
            number = stops.numbers[0]
            if os.path.getsize(told.name) == 0:
                name = signal.Signals(number).name
                typer.echo(f"abba: stopped by {name}; every checkpoint is kept, run the same command again to go on", err=True)
            return 128 + number


def keep_launcher_silent() -> None:
    """Have our launcher, if there is one, say nothing of a stop that this process tells of."""
    with suppress(KeyError, FileNotFoundError):
        os.truncate(os.environ[LAUNCHED], 1)


@dataclass
class _Stops:
    """The signals that asked for a stop.

    Attributes:
        numbers: Those that came.
        end: Whether one raises KeyboardInterrupt. Not while libraries are imported: some take it for an error of their own.
    """

    numbers: list[int]
    end: bool = False

    def obey(self) -> None:
        """Raise KeyboardInterrupt if one has come, and from now on as soon as one comes."""
        self.end = True
        if self.numbers:
            raise KeyboardInterrupt


@contextmanager
def _stops() -> Iterator[_Stops]:
    """Within this, SIGINT, SIGTERM and SIGHUP are noted."""
    stops = _Stops([])

    def receive(number: int, frame: Any) -> None:
        stops.numbers.append(number)
        if stops.end:
            raise KeyboardInterrupt

    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, receive) for number in wanted}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_agent(arguments: Sequence[str], layout: Layout, stops: _Stops) -> int:
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    stops.obey()
    logging.disable(logging.CRITICAL)  # the agent's; the processes themselves say what there is to say
    # Without a number, torchrun gives each process one thread, and says so.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // layout.processes)))
    # The agent kills its processes so many seconds after it was told to stop; 30 are not enough for a large step and its save.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    # No signals for the agent: they are ours. It ends its processes with SIGTERM then, which is silent while they still import.
    given = ["--nproc-per-node", str(layout.processes), "--signals-to-handle", ""]
    if layout.address is None:
        given += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", str(uuid.uuid4())]  # any free port
    else:
        host, _, port = layout.address.rpartition(":")
        _wait_for_name(host)
        given += ["--nnodes", str(layout.machines), "--node-rank", str(layout.rank)]
        given += ["--master-addr", host, "--master-port", port]
    config, command, command_arguments = config_from_args(get_args_parser().parse_args([*given, "-m", "abba_cli", *arguments]))
    try:
        elastic_launch(config, command)(*command_arguments)
    except DistNetworkError as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"the machines did not meet at {layout.address}: {first} Start the same command on all of them, with the address at "
            "which machine 0 is reached and a port that is free there"
        ) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            typer.echo(
                f"abba: process {rank} of {layout.count} was ended by {name}, and the others with it; run the same command again "
                "to go on from the last checkpoint",
                err=True,
            )
        return 1 if failure.exitcode < 0 else int(failure.exitcode)
    return 0


def _wait_for_name(host: str) -> None:
    """Return when an address is known for the name of machine 0; torch would wait too, with a line on each attempt.

    Raises:
        RunError: None is known.
    """
    until, told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (socket.gaierror, UnicodeError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        if time.monotonic() > until:
            raise RunError(f"--main-address: no address is known for {host} ({reason}); give the name or number of machine 0")
        if not told:
            typer.echo(f"abba: waiting for the address of {host}, which is not known so far ({reason})", err=True)
            told = True
        time.sleep(1)
