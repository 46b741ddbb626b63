"""Which of the sandbox's protections this machine refuses, found out by trying them."""

import json
import os
import select
from functools import cache

from abba_cli.evaluation.sandbox.contract import Limits
from abba_cli.evaluation.sandbox.jails import Jailed, end, start

_PROBE_SECONDS = 30
_MOST_REPORT_BYTES = 1 << 16


@cache
def missing_protections() -> tuple[str, ...]:
    """The protections that cannot be had here, each with the reason in brackets; empty where all are in force.

    A jail is set up for real, once in a process's life.
    """
    if os.name != "posix":
        return (f"every one (they need Linux, and this is {os.name})",)
    ours, its = os.pipe()
    try:
        process = start(Jailed("probe", "", None, its), Limits(), weaker=True, home="/")
        os.close(its)
        try:
            ready = select.poll()
            ready.register(ours, select.POLLIN)
            report = os.read(ours, _MOST_REPORT_BYTES) if ready.poll(_PROBE_SECONDS * 1000) else b""
        finally:
            end(process)
    finally:
        os.close(ours)
    return tuple(json.loads(report)["missing"]) if report else ("every one (a process could not be shut in at all)",)
