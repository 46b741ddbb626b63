"""A size of memory as people write it."""

import re

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_budget(text: str) -> int:
    """Bytes of a budget such as 24GB, 24GiB or 800MB.

    Raises:
        ValueError: It is not written so, or is nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size of memory; write a number and MB, GB, MiB or GiB, such as 24GB")
    return size
