"""The program's side: run it once, then answer the tests' calls to what it has defined."""

import operator
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .codec import decode, encode
from .link import Broken, Link

_MOST_TEXT = 500


def serve(source: str, link: Link) -> None:
    """Run the program's text, send the names it defines, and answer until the tests have ended."""
    module = ModuleType("program")
    sys.modules["program"] = module  # dataclasses and typing look a class's module up
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        link.send(_raised(error))
        return
    link.send(["value", [name for name in module.__dict__ if type(name) is str and not name.startswith("__")]])
    objects = _Objects()
    while True:
        try:
            request = link.receive()
        except Broken:
            return
        try:
            _answer(request, module, objects, link)
        except Exception as error:
            link.send(["raised", ["ValueError"], f"a result that cannot be sent: {type(error).__name__} {error}"[:_MOST_TEXT]])


class _Objects:
    """Objects that the tests know by number only, held for good so that a number keeps its meaning."""

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._numbers: dict[int, int] = {}

    def number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._held)
            self._held.append(value)
        return self._numbers[id(value)]

    def value(self, number: int) -> Any:
        return self._held[number]


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "set item": operator.setitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
}


def _answer(request: Any, module: ModuleType, objects: _Objects, link: Link) -> None:
    operation, data, named = request
    try:
        arguments = [decode(item, objects.value) for item in data]
        keywords = {name: decode(item, objects.value) for name, item in named.items()}
        if operation == "name":
            result = module.__dict__[arguments[0]]
        elif operation == "call":
            result = arguments[0](*arguments[1:], **keywords)
        else:
            result = _OPERATIONS[operation](*arguments)
    except BaseException as error:
        link.send(_raised(error))
        return
    if isinstance(result, ModuleType):
        link.send(["module"])
    else:
        link.send(["value", encode(result, objects.number)])


def _raised(error: BaseException) -> Any:
    try:
        text = f"{error.msg} (line {error.lineno})" if isinstance(error, SyntaxError) else str(error)
    except BaseException:
        text = ""
    return ["raised", [kind.__name__ for kind in type(error).__mro__[:-1]][:20], text[:_MOST_TEXT]]
