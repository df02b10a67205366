"""What bytes are, decided from the bytes: the formats that may be stored, and names for those that may not.

Nothing here runs, unpickles, decompresses or imports what it looks at, and memory is bounded whatever comes. Pure.
"""

from enum import StrEnum
from functools import partial

from mlmesh_registry.formats import onnx, pickles, png, safetensors, text
from mlmesh_registry.formats.source import Walker
from mlmesh_runtime.errors import InvalidInput


class Format(StrEnum):
    """The formats that may be stored. None of them can hold code that loading runs."""

    ONNX = "onnx"
    SAFETENSORS = "safetensors"
    JSON = "json"
    TEXT = "text"
    PNG = "png"


_HEAD_BYTES = 1024
# (offset, bytes, what it is). Order matters: the first that matches names the file.
_REFUSED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive (as PyTorch's .pt and .pt2, NumPy's .npz and Keras files are)"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"PK\x07\x08", "a zip archive in parts"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"\x93NUMPY", "a NumPy array, which may hold pickles"),
    (0, b"\x7fELF", "an ELF program"),
    (0, b"MZ", "a Windows program"),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O program"),
    (0, b"\xca\xfe\xba\xbe", "a Mach-O program or a Java class"),
    (0, b"#!", "a script"),
    *((0, magic, "a TensorRT engine, which is only ever built where it runs") for magic in (b"ftrt", b"ptrt", b"vtrt")),
    (0, b"GGUF", "GGUF"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"%PDF-", "PDF"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"!<arch>\n", "an ar archive"),
)
_PROTOCOLS = {2, 3, 4, 5}
_ZIP_END, _ZIP_END_BYTES, _ZIP_TAIL_BYTES = b"PK\x05\x06", 22, 22 + 0xFFFF


def recognised(head: bytes) -> str:
    """Name what the first kilobyte shows to be refused; "" when it shows nothing."""
    for offset, magic, name in _REFUSED:
        if head.startswith(magic, offset):
            return name
    if head[:1] == b"\x80" and head[1:2] and head[1] in _PROTOCOLS:
        return f"a pickle of protocol {head[1]}"
    if head[:1] == b"x" and head[1:2] in (b"\x01", b"\x5e", b"\x9c", b"\xda") and not head.isascii():
        return "a zlib stream (as joblib writes them)"
    return ""


class Examiner:
    """Decides what a file is while its bytes come by.

    Args:
        size_bytes: of the whole; what is fed must be that much.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._head = b""
        self._tail = b""
        self._refused = ""
        self._begun = False
        self._walkers: dict[Format, Walker] = {}
        self._pickle = Walker(partial(pickles.walk, size_bytes=size_bytes))

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._tail = (self._tail + data[-_ZIP_TAIL_BYTES:])[-_ZIP_TAIL_BYTES:]
        if not self._begun:
            data = self._head + data
            self._head = data[:_HEAD_BYTES]
            if len(data) < min(_HEAD_BYTES, self._size_bytes):
                return
            self._begin()
        if self._refused:
            return
        self._pickle.feed(data)
        for walker in self._walkers.values():
            walker.feed(data)
        if self._pickle.over and not self._pickle.refusal:
            self._refused = "it reads as a pickle"
        elif all(walker.refusal for walker in self._walkers.values()):
            self._refused = self._why()

    def finish(self) -> Format:
        """The format. Errors: InvalidInput (FORMAT_NOT_ALLOWED) saying what was recognised."""
        if not self._begun:
            self._begin()
        if self._refused:
            raise not_allowed(self._refused)
        if not self._pickle.finish():
            raise not_allowed("it reads as a pickle")
        if _ends_as_zip(self._tail):
            raise not_allowed("it ends as a zip archive does")
        found = {kind for kind, walker in self._walkers.items() if not walker.finish()}
        if self._too_much() or not found - {Format.JSON}:
            raise not_allowed(self._why())
        if Format.ONNX in found:
            return Format.ONNX
        # JSON is text, too: its walk does not look at what is inside of texts.
        return Format.JSON if Format.JSON in found else found.pop()

    def _begin(self) -> None:
        head, size = self._head, self._size_bytes
        self._begun = True
        if name := recognised(head):
            self._refused = f"it is {name}"
        elif head.startswith(png.SIGNATURE):
            self._walkers = {Format.PNG: Walker(partial(png.walk, size_bytes=size))}
        elif safetensors.begins(head, size):
            self._walkers = {Format.SAFETENSORS: Walker(partial(safetensors.walk, size_bytes=size))}
        else:
            if head[:1] and head[0] in onnx.FIRST_BYTES:
                self._walkers[Format.ONNX] = Walker(partial(onnx.walk, size_bytes=size))
            if head.lstrip()[:1] in (b"{", b"["):
                self._walkers[Format.JSON] = Walker(text.json_walk)
            self._walkers[Format.TEXT] = Walker(text.text_walk)

    def _too_much(self) -> bool:
        json = self._walkers.get(Format.JSON)
        return json is not None and json.refusal.startswith("a JSON document")

    def _why(self) -> str:
        if self._too_much():
            return self._walkers[Format.JSON].refusal
        reasons = [f"not {kind}: {walker.refusal}" for kind, walker in self._walkers.items() if kind is not Format.JSON]
        return "; ".join(reasons)


def _ends_as_zip(tail: bytes) -> bool:
    at = tail.rfind(_ZIP_END)
    while at >= 0:
        comment = tail[at + _ZIP_END_BYTES - 2 : at + _ZIP_END_BYTES]
        if len(comment) == 2 and at + _ZIP_END_BYTES + int.from_bytes(comment, "little") == len(tail):
            return True
        at = tail.rfind(_ZIP_END, 0, at)
    return False


def not_allowed(why: str) -> InvalidInput:
    """Build the error."""
    text = f"the bytes may not be stored: {why}. Allowed are {', '.join(Format)}"
    return InvalidInput(text, field="sha256", reason="FORMAT_NOT_ALLOWED")
