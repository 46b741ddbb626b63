"""Running code that a model has written: shut in, and judged by tests in a process that the code cannot reach.

    run_tests ──┬── jail 1: the program ── link: calls and plain data ── jail 2: the tests ── report ──> Verdict

Each jail is a fresh Python with namespaces, a file system, a user and limits of its own (`inside/`). The program's objects do not
enter the tests' process, so that nothing it patches, overwrites or exits can make a pass.
"""

from abba_cli.evaluation.sandbox.contract import Limits, Verdict
from abba_cli.evaluation.sandbox.protections import missing_protections
from abba_cli.evaluation.sandbox.running import run_tests

__all__ = ["Limits", "Verdict", "missing_protections", "run_tests"]
