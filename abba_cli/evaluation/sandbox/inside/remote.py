"""The tests' side: the program's functions and objects, each a stand-in that asks the program over the link."""

import builtins
import sys
from importlib import import_module
from typing import Any

from .codec import Malformed, decode, encode
from .link import Link

_MOST_TEXT = 200


class ProgramError(Exception):
    """An exception of a kind that only the program has."""


class ProgramLeft(Exception):
    """The program tried to leave, with SystemExit or KeyboardInterrupt."""


class Program:
    """What the program has defined.

    Args:
        link: To the process that runs the program.

    Raises:
        Exception: What the program raised when it was run, as the built-in exception nearest to it.
        Broken: It ended, or sent what no answer may be.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stand_ins: dict[int, StandIn] = {}
        match self._answer():
            case ["value", [*names]] if all(type(name) is str for name in names):
                self.names: frozenset[str] = frozenset(names)
            case _:
                raise self._link.fail("no list of names")

    def named(self, name: str) -> Any:
        """The value of a global name. A module of Python's own comes from here: the program may have changed its copy."""
        self._send("name", (name,), {})
        match self._answer():
            case ["value", data]:
                return self._decoded(data)
            case ["module"] if name in sys.stdlib_module_names:
                return import_module(name)
        raise AttributeError(f"{name} is a module that is not Python's own")

    def ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        """Do an operation on the program's side, and give its result as plain data or a stand-in."""
        self._send(operation, arguments, keywords)
        try:
            match self._answer():
                case ["value", data]:
                    return self._decoded(data)
        except StopIteration as error:
            # Out of a function it would end, unseen, a test such as all(map(...)).
            if operation != "next":
                raise RuntimeError("the program raised StopIteration") from error
            raise
        raise self._link.fail("no answer")

    def _send(self, operation: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sent = [encode(item, _number_of) for item in arguments]
        self._link.send([operation, sent, {name: encode(item, _number_of) for name, item in keywords.items()}])

    def _answer(self) -> Any:
        match self._link.receive():
            case ["raised", [*names], str(text)] if all(type(name) is str for name in names):
                raise _as_exception(names, " ".join(text.split())[:_MOST_TEXT])
            case answer:
                return answer

    def _decoded(self, data: Any) -> Any:
        try:
            return decode(data, self._stand_in)
        except (Malformed, RecursionError, MemoryError) as error:
            raise self._link.fail(f"no plain data: {error}") from error

    def _stand_in(self, number: Any) -> "StandIn":
        if type(number) is not int:
            raise Malformed("no number of an object")
        return self._stand_ins.setdefault(number, StandIn(self, number))


class StandIn:
    """An object of the program.

    It compares by identity alone, and in no order: whatever the program does, its object equals no result that a test expects.
    """

    __slots__ = ("_StandIn__number", "_StandIn__program")

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_StandIn__program", program)
        object.__setattr__(self, "_StandIn__number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__program.ask("call", self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__program.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__program.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.__program.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__program.ask("set item", self, key, value)

    def __iter__(self) -> Any:
        return self.__program.ask("iter", self)

    def __next__(self) -> Any:
        return self.__program.ask("next", self)

    def __len__(self) -> Any:
        return self.__program.ask("len", self)

    def __bool__(self) -> Any:
        return self.__program.ask("bool", self)

    def __str__(self) -> Any:
        return self.__program.ask("str", self)

    def __repr__(self) -> Any:
        return self.__program.ask("repr", self)

    def __int__(self) -> Any:
        return self.__program.ask("int", self)

    def __float__(self) -> Any:
        return self.__program.ask("float", self)


def _number_of(value: Any) -> int:
    if type(value) is not StandIn:
        raise TypeError(f"a {type(value).__name__} cannot be given to the program: it takes plain data and its own objects")
    number: int = object.__getattribute__(value, "_StandIn__number")
    return number


def _as_exception(names: list[str], text: str) -> Exception:
    """The built-in exception that stands first among an exception's bases, under its own name."""
    shown = names[0][:80] if names and names[0].isidentifier() else "Exception"
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            if not issubclass(kind, Exception):
                return ProgramLeft(shown)
            try:
                return kind(text) if name == names[0] else type(shown, (kind,), {})(text)
            except TypeError:  # one of the few that take other arguments
                break
    return ProgramError(f"{shown} {text}")
