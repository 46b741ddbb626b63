"""Templates that others wrote run within limits of time, memory and length: Jinja's sandbox itself has none."""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from jinja2 import TemplateError

from abba_cli.errors import DataError

SECONDS = 10
MEMORY_BYTES = 512 * 2**20
CHARACTERS = 20_000_000

RENDERING_ERRORS = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    # Of a template that calls itself, or nests deeper than Python's compiler goes.
    *(RuntimeError, SyntaxError),
)
"""What a template can raise by itself, compiled or rendered."""

_PAGE_BYTES = resource.getpagesize()
_Made = TypeVar("_Made")


def within_limits(what: str, make: Callable[[], _Made]) -> _Made:
    """Compile or render a template that may be broken, or made to do harm.

    The time is that which this process computes, so that a busy or sleeping machine stops nothing. It is looked after in the main
    thread alone, where Python receives signals; the memory where the system can tell and limit it (Linux).

    Args:
        what: What the template is called in messages.
        make: Compiles it (constant expressions are then computed already) or renders it.

    Returns:
        What `make` returns.

    Raises:
        DataError: It takes more than SECONDS or MEMORY_BYTES, or its text has more than CHARACTERS.
    """
    try:
        with _limited_time(), _limited_memory():
            made = make()
    except _OutOfTime:
        raise DataError(_refused(what, f"computed for more than {SECONDS} seconds")) from None
    except MemoryError:
        raise DataError(_refused(what, f"took more than {MEMORY_BYTES >> 20} MB of memory")) from None
    if isinstance(made, str) and len(made) > CHARACTERS:
        raise DataError(_refused(what, f"wrote {len(made):,} characters, more than {CHARACTERS:,}"))
    return made


class _OutOfTime(BaseException):
    """Not an Exception: code inside that catches those must not go on."""


def _refused(what: str, done: str) -> str:
    return f"{what} {done} for one row, and was stopped: it does not end, or was made to do harm; use another template"


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _OutOfTime


@contextmanager
def _limited_memory() -> Iterator[None]:
    """One multiplication of a text can take all memory before any signal is looked at, so the system has to refuse it."""
    pages = _pages()
    if pages is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * _PAGE_BYTES + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _pages() -> int | None:
    """Pages of memory that the process has addresses for; read without a file object, for it is read for every row."""
    try:
        handle = os.open("/proc/self/statm", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return int(os.read(handle, 64).split()[0])
    finally:
        os.close(handle)
