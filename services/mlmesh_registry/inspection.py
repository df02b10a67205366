"""What must be known of bytes before they become a blob: their digest, their format, a digest of every block."""

import hashlib

from mlmesh_registry.formats import Examiner
from mlmesh_registry.ledger import BLOCK_BYTES, FORMAT_NONE, Found
from mlmesh_runtime.errors import Corrupt, InvalidInput


class Inspection:
    """Looks at bytes as they come by, in order. Not for two threads at a time.

    Attributes:
        position: bytes seen.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.position = 0
        self._whole = hashlib.sha256()
        self._block = hashlib.sha256()
        self._digests = bytearray()
        self._examiner = Examiner(size_bytes)

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._whole.update(data)
        view, at = memoryview(data), 0
        while at < len(data):
            room = BLOCK_BYTES - self.position % BLOCK_BYTES
            piece = view[at : at + room]
            self._block.update(piece)
            at += len(piece)
            self.position += len(piece)
            if self.position % BLOCK_BYTES == 0:
                self._next_block()
        self._examiner.feed(data)

    def check(self, sha256: str) -> Found:
        """Say what the whole is.

        Errors: Corrupt (DIGEST_MISMATCH) when it has another digest, InvalidInput (FORMAT_NOT_ALLOWED).
        """
        found = self._whole.hexdigest()
        if self.position != self.size_bytes or found != sha256:
            text = f"the SHA-256 of the {self.position} bytes is {found}, announced was {sha256}"
            raise Corrupt(text, reason="DIGEST_MISMATCH")
        return Found(format=self._examiner.finish(), digests=self._all_digests())

    def judge(self, sha256: str) -> Found | None:
        """Say what a blob is that is stored already; None when these are not its bytes."""
        try:
            return self.check(sha256)
        except Corrupt:
            return None
        except InvalidInput:
            return Found(format=FORMAT_NONE, digests=self._all_digests())

    def _next_block(self) -> None:
        self._digests += self._block.digest()
        self._block = hashlib.sha256()

    def _all_digests(self) -> bytes:
        last = self._block.digest() if self.position % BLOCK_BYTES else b""
        return bytes(self._digests) + last
