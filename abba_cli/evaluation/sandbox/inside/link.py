"""Messages of bounded size between the program and its tests, over one socket."""

import json
import os
from typing import Any

GONE = "the other side has gone"
_HEADER_BYTES = 8
_CHUNK_BYTES = 1 << 20


class Broken(BaseException):
    """The other side has gone, or sent what no message may be. Not an Exception: no test can take it for an answer."""


class TooLarge(Exception):
    """A message over the bound, not sent."""


class Link:
    """One end.

    Args:
        descriptor: The socket.
        most_bytes: Bound of a message, both ways.
    """

    def __init__(self, descriptor: int, most_bytes: int) -> None:
        self._descriptor = descriptor
        self._most_bytes = most_bytes
        self.failure: str | None = None

    def fail(self, reason: str) -> Broken:
        """Note for good that the conversation has broken, and give the exception to raise."""
        self.failure = reason
        return Broken(reason)

    def send(self, message: Any) -> None:
        """Send JSON data.

        Raises:
            TooLarge: It is over the bound; nothing was sent.
            Broken: The other side has gone.
        """
        body = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(body) > self._most_bytes:
            raise TooLarge(f"{len(body):,} bytes; the bound is {self._most_bytes:,}")
        rest = memoryview(len(body).to_bytes(_HEADER_BYTES, "big") + body)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise self.fail(GONE) from error

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            Broken: The other side has gone, or what it sent is over the bound or no JSON.
        """
        length = int.from_bytes(self._exactly(_HEADER_BYTES), "big")
        if length > self._most_bytes:
            raise self.fail(f"a message of {length:,} bytes; the bound is {self._most_bytes:,}")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise self.fail(f"a message that is no JSON: {error}") from error

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = os.read(self._descriptor, min(count - len(parts), _CHUNK_BYTES))
            except OSError as error:
                raise self.fail(GONE) from error
            if not part:
                raise self.fail(GONE)
            parts += part
        return bytes(parts)
