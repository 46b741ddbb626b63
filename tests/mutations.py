"""Values and files gone wrong, for the fuzz tests."""

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = float(os.environ.get("ABBA_FUZZ", "1"))
"""ABBA_FUZZ=20 runs twenty times as many cases."""

ODD = st.sampled_from(
    ["", " ", "null", "~", "1e-3", "-1", "0x10", "nan", "inf", "é\u0000", "../../etc/passwd", "{{ 7 * 7 }}", "a" * 3000, "\ud800"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | ODD | st.integers(10**18, 10**40)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def cases(number: int) -> settings:
    """So many cases, or TIMES as many."""
    return settings(
        max_examples=max(1, round(number * TIMES)),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(tree, dict):
        return found + [place for key, value in tree.items() for place in _places(value, (*path, key))]
    if isinstance(tree, list):
        return found + [place for key, value in enumerate(tree) for place in _places(value, (*path, key))]
    return found


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with up to three of its values replaced, removed or renamed."""
    changed = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(changed)
        if not places:
            return changed
        *path, key = draw(st.sampled_from(places))
        parent = changed
        for step in path:
            parent = parent[step]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if how == "remove":
            del parent[key]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=10))] = draw(VALUES)
        else:
            parent[key] = draw(VALUES)
    return changed


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut short, with some flipped, or others altogether."""
    how = draw(st.sampled_from(["cut", "flip", "other", "insert"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:at]
    if how == "other":
        return draw(st.binary(max_size=200))
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    flipped = bytearray(content)
    for place in draw(st.lists(st.integers(0, max(0, len(content) - 1)), min_size=1, max_size=4)):
        if flipped:
            flipped[place] ^= draw(st.integers(1, 255))
    return bytes(flipped)
