"""Bytes that come in pieces, read as if they were there: a walk is a generator that yields whenever it needs more.

Memory is bounded by what a walk asks to keep at once; everything it skips is never kept.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

Walk = Generator[None, None, T]
"""Yields for more bytes, returns when it has seen enough, raises `Refused`."""


class Refused(Exception):  # noqa: N818  named by what it says
    """The bytes are not of that format; the text says why, and ends a sentence."""


class Source:
    """What came and was not consumed: `data` from `position` on; `offset` is where `data` begins in the whole."""

    __slots__ = ("data", "ended", "offset", "position")

    def __init__(self) -> None:
        self.data = b""
        self.position = 0
        self.offset = 0
        self.ended = False

    @property
    def here(self) -> int:
        """Position in the whole."""
        return self.offset + self.position

    def push(self, data: bytes) -> None:
        """Add what came; what was consumed is dropped."""
        self.offset += self.position
        self.data = self.data[self.position :] + data if self.position < len(self.data) else data
        self.position = 0

    def has(self, count: int) -> Walk[bool]:
        """Wait for count bytes; False when the whole ends before."""
        while len(self.data) - self.position < count:
            if self.ended:
                return False
            yield
        return True

    def take(self, count: int) -> Walk[bytes]:
        """Consume count bytes."""
        if not (yield from self.has(count)):
            raise Refused(f"it ends within {count} bytes at {self.here}")
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def skip(self, count: int) -> Walk[None]:
        """Pass count bytes without keeping them."""
        while (here := len(self.data) - self.position) < count:
            self.position += here
            count -= here
            if self.ended:
                raise Refused(f"it ends {count} bytes early")
            yield
        self.position += count

    def line(self, keep: int) -> Walk[bytes | None]:
        """Consume a line and its end; None when it is longer than keep bytes. Refused where the whole ends first."""
        kept: bytes | None = b""
        while (end := self.data.find(b"\n", self.position)) < 0:
            kept = _joined(kept, self.data[self.position :], keep)
            self.position = len(self.data)
            if self.ended:
                raise Refused("its last line has no end")
            yield
        kept = _joined(kept, self.data[self.position : end], keep)
        self.position = end + 1
        return kept


def _joined(kept: bytes | None, more: bytes, keep: int) -> bytes | None:
    return None if kept is None or len(kept) + len(more) > keep else kept + more


class Walker:
    """Drives one walk. Once it has refused or returned, more bytes are let pass."""

    def __init__(self, walk: Callable[[Source], Walk[None]]) -> None:
        self._source = Source()
        self._walk: Walk[None] | None = walk(self._source)
        self.refusal = ""
        self._go_on()

    def feed(self, data: bytes) -> None:
        """Give it the next bytes."""
        if self._walk is not None:
            self._source.push(data)
            self._go_on()

    def finish(self) -> str:
        """Say that no more comes; why it refuses, or "" when it does not."""
        self._source.ended = True
        self._go_on()
        return self.refusal

    @property
    def over(self) -> bool:
        """Whether more bytes make no difference."""
        return self._walk is None

    def _go_on(self) -> None:
        if self._walk is None:
            return
        try:
            more = next(self._walk, self)
        except Refused as refused:
            self.refusal, more = str(refused), self
        if more is self:
            self._walk, self._source = None, Source()
