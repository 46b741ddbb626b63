"""What goes between a program and its tests: plain data with their types, objects as stand-ins, and nothing that was made up."""

import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abba_cli.evaluation.sandbox import missing_protections, run_tests
from abba_cli.evaluation.sandbox.inside.codec import Malformed, decode, encode
from abba_cli.evaluation.sandbox.inside.link import Broken, Link

WEAKER = bool(missing_protections())


def refuse(thing: object) -> Any:
    raise LookupError(thing)


def there_and_back(value: Any) -> Any:
    return decode(encode(value, refuse), refuse)


hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4),
    max_leaves=6,
)
plain = st.recursive(
    hashable,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hashable, inner, max_size=4) | st.sets(hashable, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_plain_data_come_back_as_they_were(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value) or "{" in repr(value)  # the order of a set is nobody's promise


def test_hard_values() -> None:
    values = (
        10**5000,
        -(1 << 63),
        (1 << 63),
        -0.0,
        math.inf,
        5e-324,
        "\ud800",
        b"\xff",
        range(2, 9, 3),
        deque([1, (2,)]),
        bytearray(b"a"),
    )
    for value in (*values, Fraction(1, 3), Decimal("0.10"), {(): []}, {1: {2: {3: set()}}}, int, list):
        assert there_and_back(value) == value
        assert type(there_and_back(value)) is type(value)
    assert math.isnan(there_and_back(math.nan))
    assert math.copysign(1, there_and_back(-0.0)) == -1
    assert there_and_back(True) is True


class Colour(IntEnum):
    red = 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Counter("aab"), {"a": 2, "b": 1}),
        (defaultdict(list, {1: [2]}), {1: [2]}),
        (OrderedDict([(2, 1), (1, 2)]), {2: 1, 1: 2}),
        (namedtuple("Pair", "a b")(1, 2), (1, 2)),
        (Colour.red, 3),
    ],
)
def test_a_subclass_comes_back_as_its_plain_type(value: Any, expected: Any) -> None:
    assert there_and_back(value) == expected
    assert type(there_and_back(value)) is type(expected)


def test_numpy_comes_back_as_numbers_and_arrays() -> None:
    numpy = pytest.importorskip("numpy")
    assert type(there_and_back(numpy.int64(3))) is int
    assert type(there_and_back(numpy.float32(0.5))) is float
    assert type(there_and_back(numpy.bool_(True))) is bool
    for array in (numpy.arange(6).reshape(2, 3), numpy.array([1.5, math.inf]), numpy.array([1 + 2j]), numpy.array(3)):
        back = there_and_back(array)
        assert (back == array).all()
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
    for other in (numpy.array([]), numpy.array([object()])):
        with pytest.raises(LookupError):
            encode(other, refuse)


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        [1],
        ["no such kind"],
        ["int", 5],
        ["int", "zz"],
        ["dict", 1],
        ["dict", ["list"], 1],
        ["set", ["list"]],
        ["bytes", "q"],
        ["type", "eval"],
        ["type", ["list"]],
        ["range"],
        ["complex", 1],
        ["complex", ["list"], 1],
        ["fraction", "0x1", "0x0"],
        ["decimal", "x"],
        ["array", "O", [1], 1],
        ["array", "<f8", [1]],
        ["array", "<f8,O", [1], 1],
        ["array", "<f8", [3], 1.0],
        ["list", ["list", {}]],
    ],
)
def test_what_no_codec_wrote_is_refused(data: Any) -> None:
    with pytest.raises(Malformed):
        decode(data, refuse)


def test_a_link_takes_nothing_over_its_bound_and_nothing_but_json() -> None:
    import os
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Link(theirs.fileno(), 100)
        for sent, said in ((b"\xff" * 8, "the bound is 100"), ((3).to_bytes(8, "big") + b"{[}", "no JSON")):
            os.write(ours.fileno(), sent)
            with pytest.raises(Broken, match=said):
                link.receive()
            assert link.failure is not None
        ours.close()
        with pytest.raises(Broken, match="has gone"):
            link.receive()


OBJECTS = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def depth(self): return 1 + (self.left.depth() if self.left else 0)
    def __len__(self): return 7
    def __getitem__(self, key): return key * 2
class Special(KeyError): pass
LIMIT = 5
def same(node): return node
def value(nodes, default=None): return [node.value for node in nodes] if nodes else default
def adder(n): return lambda x: x + n
def count():
    yield from (1, 2, 3)
ERRORS = {"own": Special("k"), "value": ValueError("v"), "unicode": UnicodeDecodeError("utf-8", b"x", 0, 1, "r")}
def fail(kind): raise ERRORS[kind]
"""
USES = """
root = Node(1)
root.left = Node(2)
root.left.left = Node(3)
assert root.left.left.value == 3 and root.left.left.left is None
assert root.depth() == 3
assert value([root, root.left]) == [1, 2] and value([], default={1}) == {1}
assert same(root) is root and same(root) == root and same(root) != root.left
assert len(root) == 7 and root[4] == 8 and bool(root)
assert adder(2)(3) == 5
assert list(count()) == [1, 2, 3] and sum(count()) == 6
assert LIMIT == 5
for kind, error in (("own", KeyError), ("value", ValueError), ("unicode", Exception)):
    try:
        fail(kind)
    except error as caught:
        assert kind != "own" or type(caught).__name__ == "Special"
    else:
        raise RuntimeError(kind)
"""


def test_objects_of_the_program_are_used_through_stand_ins() -> None:
    verdict = run_tests(OBJECTS, USES, weaker=WEAKER)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def f(", "f()", "SyntaxError: '(' was never closed (line 1)"),
        ("x = 1 / 0", "f()", "ZeroDivisionError: division by zero"),
        ("def g(): pass", "assert f() == 1", "NameError in test 1: name 'f' is not defined"),
        ("def f(): return {}['a b']", "assert f() == 1", "KeyError in test 1: 'a b'"),
        ("def f(): return 1", "def g():\n    assert True\n    assert f() == 2\n\ng()", "AssertionError in test 2"),
        (
            "def f(): return 1",
            "x = f()\nx.append(2)",
            "AttributeError in line 2 of the tests: 'int' object has no attribute 'append'",
        ),
        ("def f(): raise TypeError('a\\nb')", "f()", "TypeError in line 1 of the tests: a b"),
        ("def f(x): return 1", "f(lambda: 1)", "TypeError in line 1 of the tests: a function cannot be given to the program"),
        ("def f(x): return 1", "assert (", "SyntaxError"),
        ("raise type('E\\n' * 99999, (ValueError,), {})('x' * 99999)", "f()", "Exception: xxx"),
    ],
)
def test_the_reason_is_one_short_line(program: str, tests: str, reason: str) -> None:
    verdict = run_tests(program, tests, weaker=WEAKER)
    assert not verdict.passed
    assert reason in verdict.reason
    assert "\n" not in verdict.reason
    assert len(verdict.reason) < 300


def test_an_argument_is_a_copy() -> None:
    program = "def f(x):\n    x.clear()\n    return []\n"
    assert not run_tests(program, "x = [2, 1]\nassert f(x) == sorted(x)", weaker=WEAKER).passed


def test_two_runs_agree_on_the_order_of_a_set() -> None:
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    assert len({run_tests(program, "raise ValueError(f())", weaker=WEAKER).reason for _ in range(4)}) == 1
