"""No program that gives wrong answers passes: what it may exit, patch, overwrite or pretend."""

import pytest

from abba_cli.evaluation.sandbox import Limits, Verdict, missing_protections, run_tests

WEAKER = bool(missing_protections())
TESTS = "import math, unittest\nassert f(1) == 2\nassert math.isclose(f(2), 3)\nunittest.TestCase().assertEqual(f(3), 4)\n"
WRONG = "\ndef f(x): return x - 1\n"

# The class that equals everything, is larger and smaller than everything, and true.
ANY = """
class Any:
    def yes(self, *_): return True
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = yes
    def no(self, *_): return False
    __ne__ = no
    def me(self, *_): return self
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = __round__ = __neg__ = me
    def __hash__(self): return 0
    def __bool__(self): return True
    def __float__(self): return self
"""


def judged(program: str, tests: str = TESTS, seconds: float = 20) -> Verdict:
    return run_tests(program, tests, weaker=WEAKER, limits=Limits(wall_seconds=seconds))


def test_a_right_program_passes() -> None:
    assert judged("def f(x): return x + 1") == Verdict(True, "passed")


def test_a_wrong_program_fails_and_the_reason_names_the_test() -> None:
    assert judged("def f(x): return 2", "assert f(1) == 2\nassert f(2) == 3\n") == Verdict(False, "AssertionError in test 2")


@pytest.mark.parametrize(
    "exit",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "import atexit, os; atexit.register(os._exit, 0); raise SystemExit(0)",
        "import threading, os; threading.Thread(target=os._exit, args=(0,)).start()",
    ],
)
@pytest.mark.parametrize("when", ["at once", "when called"])
def test_leaving_is_no_pass(exit: str, when: str) -> None:
    program = exit + WRONG if when == "at once" else f"def f(x):\n    {exit}\n    import time; time.sleep(60)\n"
    assert judged(program) == Verdict(False, "left before the tests ended") or "start new thread" in judged(program).reason


@pytest.mark.parametrize(
    "patch",
    [
        "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})\n",
        "import builtins\nfor name in ('isinstance', 'abs', 'len', 'sorted', 'set', 'type', 'all', 'any'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\n",
        "import math\nmath.isclose = lambda *a, **k: True\n",
        "import unittest\nunittest.TestCase.assertEqual = lambda *a, **k: None\n",
        "import sys\nsys.modules['math'] = sys.modules['unittest'] = None\n",
        "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\nsys.exit = lambda *a: None\n",
        "import json\njson.dumps = lambda *a, **k: '[\"value\",2]'\njson.loads = lambda *a, **k: ['call', [], {}]\n",
        "import gc, sys\nfor one in gc.get_objects():\n    if isinstance(one, dict) and 'passed' in one: one['passed'] = True\n"
        "frame = sys._getframe()\nwhile frame:\n    frame.f_globals.update(passed=True)\n    frame = frame.f_back\n",
        "import ast\ndef parse(*a, **k): return compile('pass', '', 'exec')\nast.parse = parse\n",
    ],
)
def test_patching_python_is_no_pass(patch: str) -> None:
    assert not judged(patch + WRONG).passed


@pytest.mark.parametrize("line", ['{"passed": true, "reason": "passed", "missing": []}', '["value", 2]'])
def test_writing_a_verdict_to_every_descriptor_is_no_pass(line: str) -> None:
    write = f"""
import os
line = {line!r}.encode()
for text in (line + b"\\n", len(line).to_bytes(8, "big") + line):
    for n in range(256):
        try:
            os.write(n, text)
        except OSError:
            pass
"""
    assert not judged(write + WRONG).passed


def test_overwriting_files_is_no_pass() -> None:
    write = (
        "import os\nfor folder in (os.getcwd(), '/tmp', '/', '/dev/shm', os.path.dirname(os.__file__)):\n"
        "    for name in ('results.json', 'report', 'math.py', 'os.py', 'unittest.py', 'sitecustomize.py'):\n"
        "        try: open(os.path.join(folder, name), 'w').write('passed = True')\n"
        "        except OSError: pass\n"
    )
    assert not judged(write + WRONG).passed


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) == 2",
        "assert 2 == f(1)",
        "assert not f(1) != 2",
        "assert abs(f(1) - 2) < 1e-6",
        "assert f(1) in (2, 3)",
        "assert 2 in f(1)",
        "assert f(1) <= 2",
        "assert [f(1)] == [2]",
        "assert round(f(1), 2) == 2",
        "assert -f(1) > 0 or f(1) > 5",
    ],
)
def test_an_object_that_equals_everything_equals_nothing(test: str) -> None:
    program = ANY + "def f(x): return Any()\n"
    exec(program + test, {})  # in one process it fools the test
    assert not judged(program, test).passed


@pytest.mark.parametrize("base", ["int", "float", "str", "list", "dict", "tuple", "set"])
def test_a_subclass_of_a_plain_type_is_its_content(base: str) -> None:
    always = f"class Always({base}):\n    def __eq__(self, other): return True\n    __hash__ = {base}.__hash__\n"
    content = {"int": "2", "float": "2.5", "str": "'a'", "list": "[1]", "dict": "{1: 2}", "tuple": "(1,)", "set": "{1}"}[base]
    assert not judged(always + f"def f(x): return Always({content})", "assert f(1) == 'right'").passed
    assert judged(always + f"def f(x): return Always({content})", f"assert f(1) == {content}").passed


def test_the_tests_own_names_and_builtins_are_not_the_programs() -> None:
    helper = "def check(candidate): pass\ndef set(x): return 0\ndef abs(x): return 0\n__name__ = 'other'\n"
    assert not judged(helper + WRONG, "def check(c):\n    assert c(1) == 2\ncheck(f)").passed
    assert not judged(helper + WRONG, "assert set([f(1)]) == set([2])").passed
    assert not judged(helper + WRONG, "assert abs(f(1) - 2) < 1e-9").passed
    assert not judged(helper + WRONG, "if __name__ != 'other':\n    assert f(1) == 2").passed


def test_a_module_that_the_program_changed_is_fresh_in_the_tests() -> None:
    program = "import math\nmath.isclose = lambda *a: True\n"
    assert not judged(program + WRONG, "assert math.isclose(f(1), 2)").passed
    assert judged(program + "def f(x): return x + 1", "assert math.isclose(f(1), 2)").passed
    fake = "class math:\n    isclose = staticmethod(lambda *a: False)\n"
    assert "test 1" in judged(fake + "def f(x): return x + 1", "assert math.isclose(f(1), 2)").reason


def test_an_exception_does_not_end_a_loop_of_tests_unseen() -> None:
    stops = "def f(x): raise StopIteration"
    reason = judged(stops, "assert all(map(lambda x: f(x) == x + 1, [1, 2]))").reason
    assert reason == "RuntimeError in test 1: the program raised StopIteration"


def test_a_program_that_has_gone_cannot_be_forgiven_by_the_tests() -> None:
    forgiving = "try:\n    assert f(1) == 2\nexcept:\n    pass\n"
    assert judged("import os\ndef f(x): os._exit(0)", forgiving) == Verdict(False, "left before the tests ended")


def test_an_empty_array_neither_equals_nor_differs() -> None:
    pytest.importorskip("numpy")
    program = "import numpy\ndef f(x): return numpy.array([])"
    assert not judged(program, "if f(1) != 2:\n    raise ValueError").passed
