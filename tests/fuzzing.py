"""The command as the fuzz tests call it: in this process, with its exit code and message looked at, and every case counted."""

import contextlib
import io
import json
import os
import re
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import typer

from abba_cli import cli

_APP = typer.main.get_command(cli.app)
"""Built once: typer builds it anew for every call, in a quarter of the time that a case takes."""
COUNTED: dict[str, Counter[int]] = defaultdict(Counter)
"""Cases of each kind by their exit code."""
_SECONDS = 120
"""No case takes so long; one that does is taken for hanging."""
_INSIDES = ("Traceback (most recent", " object at 0x", "Error(", "site-packages")


def run_case(kind: str, *arguments: object) -> tuple[int, str]:
    """Run the command on a case, and count it.

    Args:
        kind: What is gone wrong in it.
        arguments: Of the command line.

    Returns:
        The exit code, and what it wrote.
    """
    # A shell gives no zero bytes, and what is no UTF-8 as lone surrogates of one kind.
    argv = [str(one).replace("\0", "").encode(errors="surrogatepass").decode(errors="surrogateescape") for one in arguments]
    # As a terminal takes it: stdout refuses what is no Unicode, stderr writes it with backslashes.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    before, sys.argv = sys.argv, ["abba", *argv]
    code: object = 0
    try:
        with mock.patch.object(cli, "app", _APP), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _no_hang():
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    text, message = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    assert code in (0, 1, 2), code
    COUNTED[kind][int(code)] += 1
    assert not any(one in text + message for one in _INSIDES), text + message
    if code == 1:
        assert re.search(r"^abba: \S", message, re.MULTILINE), message
    if code == 2:
        assert "Usage: abba" in message, message
        assert "Error: " in message, message
    return int(code), text + message


@contextlib.contextmanager
def _no_hang() -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"the command is not done after {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def summary() -> str:
    """How many cases of each kind there were, and how they ended; also written to the file that ABBA_FUZZ_COUNTS names."""
    total: Counter[int] = Counter()
    for codes in COUNTED.values():
        total.update(codes)
    if (file := os.environ.get("ABBA_FUZZ_COUNTS")) is not None:
        kinds = {kind: {str(code): codes[code] for code in sorted(codes)} for kind, codes in COUNTED.items()}
        Path(file).write_text(json.dumps({"cases": total.total(), "by_kind_and_exit_code": kinds}, indent=1) + "\n")
    kinds_text = ", ".join(f"{kind} {codes.total():,}" for kind, codes in sorted(COUNTED.items()))
    ended = ", ".join(f"{total[code]:,} with {code}" for code in (0, 1, 2))
    return f"{total.total():,} cases of bad input, none with a traceback ({kinds_text}); exit codes: {ended}"
