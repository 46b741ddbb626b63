"""What a jail's interpreter runs first: read the settings, shut itself in, then be the program, the tests, or a probe."""

import json
import os
import sys
from typing import Any

from . import checking, jail, link, program, refusals


def main() -> None:
    """Never returns. Settings are JSON on standard input, written by the process that started this one."""
    with os.fdopen(os.dup(0), "rb") as stream:
        settings: dict[str, Any] = json.load(stream)
    if os.getppid() != settings["parent"]:
        os._exit(1)
    os.dup2(1, 0)  # /dev/null
    sys.path[:] = [*sys.path[1:], *settings["packages"]]  # without the folder of this package
    keep = [settings[end] for end in ("link", "report") if settings[end] is not None]
    missing = jail.enter(settings["visible"], jail.Bounds(**settings["bounds"]), keep)
    home = os.getcwd()
    os.environ.clear()
    os.environ.update({**settings["environment"], "HOME": home})
    unfit = bool(missing) and not settings["weaker"]
    try:
        _be(settings, missing, unfit, home)
    finally:
        os._exit(1)


def _be(settings: dict[str, Any], missing: list[str], unfit: bool, home: str) -> None:
    if settings["role"] == "probe":
        _report(settings["report"], {"missing": missing})
        os._exit(0)
    end = link.Link(settings["link"], settings["most_bytes"])
    if settings["role"] == "program":
        end.send(missing if unfit else [])  # before the program runs, so it cannot be the program's
        if unfit:
            os._exit(1)
        if missing:
            refusals.install(home, settings["visible"])
        program.serve(settings["text"], end)
        os._exit(0)
    try:
        others = end.receive()
    except link.Broken:
        others = ["a process for the program (it ended before it was shut in)"]
    _report(settings["report"], {"missing": missing if unfit else others})
    if not unfit and not others:
        _report(settings["report"], checking.check(settings["text"], end))
        os._exit(0)


def _report(descriptor: int, message: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(message).encode("ascii") + b"\n")
