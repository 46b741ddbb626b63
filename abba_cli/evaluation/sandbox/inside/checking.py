"""The tests' process: run the tests against the program on the other end of the link, and say what came of it."""

import ast
import builtins
import symtable
import traceback
from collections.abc import Mapping
from typing import Any

from .link import Broken, Link
from .remote import Program, ProgramLeft

_FILE = "<tests>"
LEFT = "left before the tests ended"


def check(tests: str, link: Link) -> dict[str, Any]:
    """Run the tests.

    Returns:
        `passed`, `reason`, and `gone` if the program's process ended first.
    """
    try:
        program = Program(link)
    except Broken:
        return {"passed": False, "reason": LEFT, "gone": True}
    except ProgramLeft:
        return {"passed": False, "reason": LEFT}
    except BaseException as error:
        return {"passed": False, "reason": _named(error)}
    try:
        exec(compile(tests, _FILE, "exec", dont_inherit=True), {"__name__": "tests", **_names(tests, program)})
    except ProgramLeft:
        return {"passed": False, "reason": LEFT}
    except BaseException as error:
        if link.failure is None:
            return {"passed": False, "reason": _where(error, tests)}
    if link.failure is not None:
        return {"passed": False, "reason": LEFT, "gone": True}
    return {"passed": True, "reason": "passed"}


def _names(tests: str, program: Program) -> Mapping[str, Any]:
    """The program's names that the tests use.

    A program must not put its own `set` or `abs` under a test that says `set(f(1)) == {2}`. So a built-in name is the program's
    only where the tests use no other of its names: then it is what they test.
    """
    shared = _free_names(symtable.symtable(tests, _FILE, "exec")) & {name for name in program.names if not name.startswith("__")}
    own = {name for name in shared if not hasattr(builtins, name)} or shared
    return {name: program.named(name) for name in sorted(own)}


def _free_names(module: symtable.SymbolTable) -> set[str]:
    """Global names that the tests read and do not define themselves."""
    own = {one.get_name() for one in module.get_symbols() if one.is_assigned() or one.is_imported()}
    read, tables = set(), [module]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        read |= {one.get_name() for one in table.get_symbols() if one.is_referenced() and one.is_global()}
    return read - own


def _where(error: BaseException, tests: str) -> str:
    lines = [frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _FILE]
    try:
        asserts = sorted(
            (node.lineno, node.end_lineno or 0) for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Assert)
        )
    except SyntaxError:
        return f"the tests: {_named(error)}"
    for line in reversed(lines):
        for number, (first, last) in enumerate(asserts, start=1):
            if first <= line <= last:
                return _named(error, f" in test {number}")
    return _named(error, f" in line {lines[-1]} of the tests" if lines else "")


def _named(error: BaseException, where: str = "") -> str:
    name = type(error).__name__
    if isinstance(error, AssertionError):
        return name + where
    text = " ".join(" ".join(map(str, error.args)).split())[:200]  # str() of a KeyError would add quotes
    return f"{name}{where}: {text}" if text else name + where
