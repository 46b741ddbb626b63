"""The run: which rows are left, one process for each, what is written, and what is printed last."""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import asdict
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from abba_cli.errors import AbbaError, RunError

from .grids import GRIDS, SHAPES, Row, rows_of
from .plots import plot
from .report import report

START_SECONDS = 12.0  # of a process, before its first step
REPORT_SECONDS = 15.0
MINUTES_ON_CUDA = 10.0
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows that are left, write the results, print the table last.

    Returns:
        1 if a row failed or the arguments are no use, else 0.
    """
    options = _options(arguments)
    try:
        return _run(options)
    except AbbaError as error:
        print(error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    # Without these, each measure of memory on a CPU prints lines of the profiler's own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    settings = {"device": options.device, "rounds": options.rounds, "optimizer": options.optimizer}
    if options.reference and not (options.reference / "abba.py").is_file():
        raise RunError(f"--reference {options.reference}: no abba.py in it; expected a checkout of github.com/CERT-Lab/abba.")
    rows = rows_of(options.grid, options.device, options.reference is not None)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"
    records = [record for record in _read(file) if record["settings"] == settings]
    left = [row for row in rows if _find(records, row) is None]
    if len(left) < len(rows):
        _say(f"{len(rows) - len(left)} of {len(rows)} rows are there already, in {file}")
    notes: list[str] = []
    for row in left:
        at = f"[{rows.index(row) + 1}/{len(rows)}] {row.title}"
        rate = _rate(records)
        remaining = options.minutes * 60 - REPORT_SECONDS - (time.monotonic() - started) if options.minutes else None
        expected = None if rate is None else START_SECONDS + rate * _work(row, options.rounds)
        if remaining is not None and remaining < (expected or START_SECONDS):
            notes.append(f"Skipped, for it would not have ended within {options.minutes:g} minutes: {row.title}.")
            _say(f"{at}: skipped, no time left for it")
            continue
        _say(f"{at}{_left(left[left.index(row) :], rate, options.rounds)}")
        row_started = time.monotonic()
        outcome = _in_a_process(row, options, remaining)
        if isinstance(outcome, str):
            notes.append(f"Failed: {row.title}: {outcome}.")
            _say(f"{at}: {outcome}")
            continue
        outcome["wall_seconds"] = round(time.monotonic() - row_started, 1)
        records.append(outcome)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(outcome) + "\n")
    done = [record for row in rows if (record := _find(records, row))]
    if done:
        plot(done, options.out)
        command = f"python benchmarks/run.py --device {options.device} --grid {options.grid} --rounds {options.rounds}"
        command += " --optimizer" * options.optimizer + " --reference DIR" * bool(options.reference)
        table = report(done, notes, command)
        (options.out / "table.md").write_text(table, encoding="utf-8")
        print(table)
    else:
        print("\n".join(notes))
    return int(any(note.startswith("Failed") for note in notes))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="ABBA beside its peers, measured on this machine.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a card")
    parser.add_argument("--grid", choices=GRIDS, default="headline", help="default: headline")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method (default: 5)")
    parser.add_argument("--optimizer", action="store_true", help="include fused AdamW in a step")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of github.com/CERT-Lab/abba to measure, too")
    parser.add_argument(
        "--minutes", type=float, help=f"skip rows that would end later (default: {MINUTES_ON_CUDA:g} on cuda, else none)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/DEVICE-DATE")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected 1 or more")
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.minutes is None and options.device == "cuda":
        options.minutes = MINUTES_ON_CUDA
    if options.out is None:
        options.out = Path(__file__).parents[1] / "results" / f"{options.device}-{date.today().isoformat()}"
    return options


def _in_a_process(row: Row, options: argparse.Namespace, seconds: float | None) -> Record | str:
    """The record of a row, or why there is none. A fresh process: nothing of another row is left in its memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    settings = (options.device, options.rounds, options.optimizer, options.reference)
    process = context.Process(target=_child, args=(sender, row, settings), daemon=True)
    process.start()
    sender.close()  # so that the end of the process ends the waiting
    try:
        if not receiver.poll(seconds):
            return "the time was up"
        answer: Record | str = receiver.recv()
        return answer
    except EOFError:
        process.join()
        killed = " (ended by the system, most likely for want of memory)" if process.exitcode == -9 else ""
        return f"its process ended with code {process.exitcode}{killed}"
    finally:
        process.kill()
        process.join()


def _child(sender: Connection, row: Row, settings: tuple[Any, ...]) -> None:
    from .measure import Settings, measure

    try:
        sender.send(measure(row, Settings(*settings)))
    except Exception as error:  # whatever it is ends this row only, and is shown whole
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _read(file: Path) -> list[Record]:
    """Records of earlier runs. The last line may have been cut short."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _find(records: list[Record], row: Row) -> Record | None:
    wanted = json.loads(json.dumps(asdict(row)))  # with lists for tuples
    return next((record for record in records if json.loads(json.dumps(record["row"])) == wanted), None)


def _rate(records: list[Record]) -> float | None:
    """Seconds for one unit of work, from the rows that are done."""
    work = sum(_work(Row(**record["row"]), record["settings"]["rounds"]) for record in records)
    return sum(max(record["wall_seconds"] - START_SECONDS, 1.0) for record in records) / work if work else None


def _work(row: Row, rounds: int) -> float:
    """Multiplications, roughly: of all rounds, and as much again for the warm-up and the measures of memory."""
    shape = SHAPES[row.shape]
    parameters = row.layers * shape.layer_parameters + (shape.vocabulary * shape.hidden if row.whole else 0)
    precision = {"bf16": 1.0, "nf4": 1.3, "fp32": 2.0}[row.precision]
    return float(row.tokens * parameters * precision * (1.4 if row.checkpointing else 1.0) * len(row.methods) * (rounds + 4))


def _left(rows: list[Row], rate: float | None, rounds: int) -> str:
    if rate is None:
        return ""
    minutes = sum(START_SECONDS + rate * _work(row, rounds) for row in rows) / 60
    return f", about {minutes:.0f} minutes left" if minutes >= 1.5 else ", about a minute left"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
