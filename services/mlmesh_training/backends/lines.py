"""Bytes of a pipe into lines, with a bound on each. Pure."""

from __future__ import annotations

from collections.abc import Iterator


class LineSplitter:
    """Cuts a stream of bytes into lines without their ends.

    Args:
        line_bytes_max: a longer line is cut there and the rest of it is dropped.
    """

    def __init__(self, line_bytes_max: int) -> None:
        self._most = line_bytes_max
        self._held = bytearray()
        self._dropping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take in bytes; give every line that is complete now."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            yield self._take(part)
        self._keep(rest)

    def end(self) -> Iterator[bytes]:
        """The stream ended: give what is left, if anything."""
        if self._held:
            yield self._take(b"")

    def _take(self, part: bytes) -> bytes:
        self._keep(part)
        line = bytes(self._held)
        self._held.clear()
        self._dropping = False
        return line.removesuffix(b"\r")

    def _keep(self, part: bytes) -> None:
        if not self._dropping:
            self._held += part[: self._most - len(self._held)]
            self._dropping = len(self._held) >= self._most
