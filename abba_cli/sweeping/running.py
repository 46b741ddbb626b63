"""Running a sweep: every run in processes of its own, one after the other or several at a time, going on where it was stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from abba_cli.disk import disk_errors, take_lock, write_atomically
from abba_cli.errors import RunError, TrainingInterrupted
from abba_cli.events import Listener, Note, Stage, ignore
from abba_cli.recipe_file import dump_recipe
from abba_cli.rundir import RunDir
from abba_cli.sweeping.planning import Run, Sweep
from abba_cli.sweeping.records import Record, failure, read_record, record_of, write_record

PARTS = 1000
"""Parts of a run that progress is counted in."""
_POLL_SECONDS = 1.0


@dataclass
class Progress:
    """How far a sweep is.

    Args:
        listen: Called with a Stage as it moves.
        total: Runs in all.
        finished: Runs that have ended.
        now: Parts done of each run that is being worked on, with what it does.
    """

    listen: Listener
    total: int
    finished: int = 0
    now: dict[str, tuple[int, str]] = field(default_factory=dict)

    def tell(self) -> None:
        """Say where it stands."""
        done = self.finished * PARTS + sum(part for part, _ in self.now.values())
        text = "; ".join(f"{name}: {what}" for name, (_, what) in self.now.items())
        self.listen(Stage(f"run {min(self.finished + 1, self.total)} of {self.total}  {text}", done, self.total * PARTS))


def run_sweep(sweep: Sweep, parallel: int = 1, listen: Listener = ignore) -> tuple[list[Record], list[str]]:
    """Make every run that has no record yet.

    Args:
        sweep: What to run.
        parallel: Runs at a time, each on devices of its own.
        listen: Called with a Stage as runs move on, in thousandths of a run, and with a Note on each that has ended.

    Returns:
        The records of all runs, and the names of those that were not made: the time was up, or nothing could be chosen for them.

    Raises:
        RunError: Another process is running this sweep, or the output cannot be written.
        TrainingInterrupted: A signal came; what runs was saved.
    """
    tuning = sweep.tuning_runs()
    everything = len(tuning) + len(sweep.points) * len(sweep.file.seeds)
    progress = Progress(listen, everything)
    until = None if sweep.file.hours is None else time.monotonic() + 3600 * sweep.file.hours
    with _locked(sweep.output), _Children() as children:
        pool = _Pool(sweep, parallel, progress, children, until)
        tried = pool.run_all(tuning)
        runs = sweep.runs(choose(sweep, tried))
        # A point whose tuning is not complete has no runs yet.
        left = pool.left + [
            f"runs/{point.slug}/seed-{seed}"
            for seed in sweep.file.seeds
            for point in sweep.points
            if point.label not in {run.point.label for run in runs}
        ]
        made = pool.run_all(runs)
        return [*tried, *made], [*left, *(name for name in pool.left if name not in left)]


def choose(sweep: Sweep, tried: Sequence[Record]) -> dict[str, Mapping[str, Any]]:
    """The values with the lowest evaluation loss for each point whose tuning runs have all ended; failed ones are not chosen."""
    chosen: dict[str, Mapping[str, Any]] = {}
    if sweep.file.tune is None:
        return {point.label: {} for point in sweep.points}
    expected = dict.fromkeys((point.label for point in sweep.points), 0)
    for run in sweep.tuning_runs():
        expected[run.point.label] += 1
    for label, count in expected.items():
        records = [record for record in tried if record.label == label]
        losses = [(record.eval_loss, place) for place, record in enumerate(records) if record.eval_loss is not None]
        if len(records) == count and losses:
            chosen[label] = records[min(losses)[1]].tuned
    return chosen


class _Pool:
    """Makes runs, `parallel` at a time."""

    def __init__(self, sweep: Sweep, parallel: int, progress: Progress, children: "_Children", until: float | None) -> None:
        self._sweep, self._progress, self._children, self._until = sweep, progress, children, until
        self._devices = _devices(parallel)
        self.left: list[str] = []

    def run_all(self, runs: Sequence[Run]) -> list[Record]:
        """Records of the runs, in their order; those for which there was no time are in `left`."""
        records: dict[str, Record] = {}
        waiting = []
        for run in runs:
            known = read_record(run, self._sweep.output)
            if known is not None and known.status == "done":
                records[run.name] = known
                self._progress.finished += 1
            else:
                waiting.append(run)
        self._progress.tell()
        free = list(self._devices)
        working: dict[Future[Record], tuple[Run, dict[str, str]]] = {}
        with ThreadPoolExecutor(len(free)) as threads:
            while waiting or working:
                while waiting and free:
                    if self._children.signal_number is not None or (self._until and time.monotonic() > self._until):
                        self.left += [run.name for run in waiting]
                        waiting.clear()
                        break
                    run, device = waiting.pop(0), free.pop(0)
                    working[threads.submit(self._make, run, device)] = run, device
                if not working:
                    break
                done, _ = wait(working, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for one in done:
                    run, device = working.pop(one)
                    free.append(device)
                    self._progress.now.pop(run.name, None)
                    self._children.raise_if_stopped(self._sweep.output)
                    record = one.result()
                    if record.status == "failed" and self._children.signal_number is not None:
                        continue  # it was stopped, as others will be
                    records[run.name] = record
                    write_record(record, self._sweep.output)
                    self._progress.finished += 1
                    self._progress.listen(Note(_told(record)))
                self._progress.tell()
        self._children.raise_if_stopped(self._sweep.output)
        return [records[run.name] for run in runs if run.name in records]

    def _make(self, run: Run, device: Mapping[str, str]) -> Record:
        folder = self._sweep.output / run.name
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            recipe = folder.parent / f"{folder.name}.yaml"
            write_atomically(recipe, dump_recipe(run.recipe))
        log = folder.parent / f"{folder.name}.log"
        steps = run.recipe.training.max_steps
        evaluate = self._sweep.file.evaluate if run.kind == "run" else None
        share = 0.75 if evaluate else 1.0

        def training() -> None:
            rows = [row["step"] for row in RunDir(folder).metrics() if "loss" in row]
            part = rows[-1] / steps if rows and steps else 0.0
            what = "finishing" if part == 1 else f"step {rows[-1] if rows else 0}/{steps or '?'}"
            self._progress.now[run.name] = int(PARTS * share * part), what

        code = self._children.run(["train", str(recipe)], log, device, training)
        if code == 0 and evaluate is not None:
            command = ["eval", str(folder), "--tasks", ",".join(evaluate.tasks)]
            command += ["--limit", str(evaluate.limit)] if evaluate.limit else []
            command += ["--batch-size", str(evaluate.batch_size)] if evaluate.batch_size else []
            command += ["--data-dir", str(self._sweep.data_dir)] if self._sweep.data_dir else []

            def scoring() -> None:
                self._progress.now[run.name] = int(PARTS * share), "scoring tasks"

            code = self._children.run(command, log, device, scoring)
        return record_of(run, folder) if code == 0 else failure(run, _last_words(log, code))


class _Children:
    """The processes of the runs, which are told of every signal that this one gets."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Children":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.signal_number = self.signal_number or number
        for child in list(self._running):
            child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def raise_if_stopped(self, output: Path) -> None:
        """Raise TrainingInterrupted where a signal has come and everything has ended."""
        if self.signal_number is not None and not self._running:
            advice = f"stopped; every checkpoint in {output} is kept, run the same command again to go on"
            raise TrainingInterrupted(advice, self.signal_number)

    def run(self, arguments: Sequence[str], log: Path, device: Mapping[str, str], look: Callable[[], None]) -> int:
        """Run `abba ARGUMENTS` and return its exit code; `look` is called from time to time."""
        if self.signal_number is not None:
            return 128 + self.signal_number
        with disk_errors(log), log.open("ab") as stream:
            # A session of its own: a terminal's Ctrl-C comes once, from here. And a pipe that ends when this process does.
            child = subprocess.Popen(
                [sys.executable, "-m", "abba_cli.sweeping.child", *arguments],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **device},
                start_new_session=True,
            )
        self._running.add(child)
        if self.signal_number is not None:  # it came while the process was started
            child.send_signal(signal.SIGTERM)
        try:
            while True:
                look()
                try:
                    return child.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            self._running.discard(child)
            assert child.stdin is not None
            child.stdin.close()


def _devices(parallel: int) -> list[dict[str, str]]:
    """For each run at a time the environment that shows it its share of the devices.

    Raises:
        RunError: There are fewer devices than runs at a time.
    """
    if parallel == 1:
        return [{}]
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        threads = max(1, (os.cpu_count() or 1) // parallel)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in range(parallel)]
    if parallel > count:
        raise RunError(f"--parallel {parallel} needs a GPU for each run at a time; {count} are visible")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[place::parallel])} for place in range(parallel)]


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        stream: IO[str] | None = take_lock(output / ".lock")
    if stream is None:
        raise RunError(f"another process is running the sweep in {output}; wait for it, or choose another --output")
    with stream:
        yield


def _last_words(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; see {log}"
    said = next((line for line in reversed(lines) if line.startswith("abba: ")), lines[-1] if lines else "")
    return said.removeprefix("abba: ")[:300] or f"exit code {code}; see {log}"


def _told(record: Record) -> str:
    if record.status == "failed":
        return f"{record.name} failed: {record.error}"
    loss = "" if record.eval_loss is None else f"  evaluation loss {record.eval_loss:.4f}"
    scores = "".join(f"  {task} {100 * value:.1f}" for task, value in record.scores.items())
    return f"{record.name}: {record.seconds or 0:.0f} s{loss}{scores}"


def read_all(sweep: Sweep) -> tuple[list[Record], list[str]]:
    """The records that a sweep has, and the names of the runs that have none."""
    tuning = sweep.tuning_runs()
    tried = [record for run in tuning if (record := read_record(run, sweep.output))]
    runs = sweep.runs(choose(sweep, tried))
    made = [record for run in runs if (record := read_record(run, sweep.output))]
    known = {record.name for record in [*tried, *made]}
    names = [run.name for run in tuning]
    names += [f"runs/{point.slug}/seed-{seed}" for seed in sweep.file.seeds for point in sweep.points]
    return [*tried, *made], [name for name in names if name not in known]
