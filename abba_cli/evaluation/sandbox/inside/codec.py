"""Plain data between the program and its tests: a strict form in which no object can carry behaviour of its own.

JSON carries it: null, true, false, strings, floats and integers of 64 bits stand for themselves, the rest is a list that
begins with the name of its kind. An object of a type that is not here is a number that the other side cannot look into.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

_BUILTIN_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, object, type)
}
_AS_IS = (type(None), bool, str, float)
_ARRAYS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "f16", "c8", "c16")
_WIDE = 1 << 63


class Malformed(Exception):
    """A message that no codec wrote."""


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """A value as JSON data; a subclass counts as the plain type under it, read by that type's own methods.

    Args:
        value: What to send.
        refer: Gives a number for an object that is no plain data, or raises.
    """
    kind: type = type(value)
    if kind in _AS_IS:
        return value
    if kind is int and -_WIDE < value < _WIDE:
        return value
    for base in kind.__mro__[:-1]:
        if base in _SENT:
            return _SENT[base](value, refer)
    if kind.__module__ in ("numpy", "fractions", "decimal"):
        sent = _number_or_array(value, refer)
        if sent is not None:
            return sent
    if kind is type and value in _BUILTIN_TYPES.values():
        return ["type", value.__name__]
    return ["object", refer(value)]


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value that JSON data stands for.

    Args:
        data: As the other side sent it; nothing about it is trusted.
        resolve: Gives the object for a number, or raises.

    Raises:
        Malformed: It is not in the form that `encode` writes.
    """
    if type(data) is not list:
        if type(data) is dict:
            raise Malformed("a JSON object")
        return data
    if not data or type(data[0]) is not str or data[0] not in _RECEIVED:
        raise Malformed(f"an unknown kind {data[:1]!r:.80}")
    try:
        return _RECEIVED[data[0]](data[1:], resolve)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise Malformed(f"{data[0]}: {error}") from error


def _sender(name: str, items: Callable[[Any], Iterable[Any]]) -> Callable[[Any, Callable[[Any], int]], Any]:
    return lambda value, refer: [name, *[encode(item, refer) for item in items(value)]]


def _pairs(value: dict[Any, Any]) -> Iterable[Any]:
    for key, item in dict.items(value):
        yield key
        yield item


def _integer(value: int, _refer: Callable[[Any], int]) -> Any:
    plain = int.__int__(value)
    return plain if -_WIDE < plain < _WIDE else ["int", hex(plain)]


_SENT: dict[type, Callable[[Any, Callable[[Any], int]], Any]] = {
    int: _integer,
    str: lambda value, _refer: str.__str__(value),
    float: lambda value, _refer: float.__float__(value),
    complex: lambda value, _refer: ["complex", value.real, value.imag],
    bytes: lambda value, _refer: ["bytes", bytes.hex(value)],
    bytearray: lambda value, _refer: ["bytearray", bytearray.hex(value)],
    range: lambda value, _refer: ["range", hex(value.start), hex(value.stop), hex(value.step)],
    list: _sender("list", list.__iter__),
    tuple: _sender("tuple", tuple.__iter__),
    set: _sender("set", set.__iter__),
    frozenset: _sender("frozenset", frozenset.__iter__),
    deque: _sender("deque", deque.__iter__),
    dict: _sender("dict", _pairs),
}


def _number_or_array(value: Any, refer: Callable[[Any], int]) -> Any:
    kind = type(value).__name__
    if kind == "Fraction":
        return ["fraction", hex(value.numerator), hex(value.denominator)]
    if kind == "Decimal":
        return ["decimal", str(value)]
    # An empty array is neither equal nor unequal to anything, which a test may take for an agreement.
    if kind == "ndarray" and value.dtype.kind in "biufc" and value.size:
        return ["array", value.dtype.str, list(value.shape), *[encode(item, refer) for item in value.ravel().tolist()]]
    if hasattr(value, "item") and getattr(value, "dtype", None) is not None and kind != "ndarray":
        return encode(value.item(), refer)
    return None


def _all(data: list[Any], resolve: Callable[[int], Any]) -> list[Any]:
    return [decode(item, resolve) for item in data]


def _dict(data: list[Any], resolve: Callable[[int], Any]) -> dict[Any, Any]:
    items = _all(data, resolve)
    return dict(zip(items[::2], items[1::2], strict=True))


def _fraction(data: list[Any], _resolve: Callable[[int], Any]) -> Any:
    from fractions import Fraction

    return Fraction(int(data[0], 16), int(data[1], 16))


def _decimal(data: list[Any], _resolve: Callable[[int], Any]) -> Any:
    from decimal import Decimal

    return Decimal(data[0])


def _array(data: list[Any], resolve: Callable[[int], Any]) -> Any:
    import numpy

    kind, shape, *items = data
    if kind.lstrip("<>=|") not in _ARRAYS or not items:
        raise Malformed("an array of objects, or of nothing")
    return numpy.array(_all(items, resolve), dtype=kind).reshape(shape)


_RECEIVED: dict[str, Callable[[list[Any], Callable[[int], Any]], Any]] = {
    "int": lambda data, _resolve: int(data[0], 16),
    "complex": lambda data, _resolve: complex(float(data[0]), float(data[1])),
    "bytes": lambda data, _resolve: bytes.fromhex(data[0]),
    "bytearray": lambda data, _resolve: bytearray.fromhex(data[0]),
    "range": lambda data, _resolve: range(*[int(bound, 16) for bound in data]),
    "list": _all,
    "tuple": lambda data, resolve: tuple(_all(data, resolve)),
    "set": lambda data, resolve: set(_all(data, resolve)),
    "frozenset": lambda data, resolve: frozenset(_all(data, resolve)),
    "deque": lambda data, resolve: deque(_all(data, resolve)),
    "dict": _dict,
    "fraction": _fraction,
    "decimal": _decimal,
    "array": _array,
    "type": lambda data, _resolve: _BUILTIN_TYPES[data[0]],
    "object": lambda data, resolve: resolve(data[0]),
}
