"""Text and JSON. Text is UTF-8 without control characters; JSON is also exactly one value, not too deep, not too large.

JSON's grammar is that of RFC 8259. Nothing is built: a document is passed through regular expressions, so a bomb of
brackets costs as much as its bytes.
"""

import codecs
import re

from mlmesh_registry.formats.source import Refused, Source, Walk

JSON_BYTES_MAX = 64 << 20
JSON_DEPTH_MAX = 128
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r"))
_WINDOW = 1 << 16


def text_walk(source: Source) -> Walk[None]:
    """Refuse what is not UTF-8, or holds control characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        data = source.data[source.position :]
        try:
            decoder.decode(data, final=source.ended)
        except UnicodeDecodeError as error:
            raise Refused(f"around byte {source.here + error.start} it is not UTF-8") from error
        if len(data.translate(None, _CONTROLS)) != len(data):
            at = next(index for index, byte in enumerate(data) if byte in _CONTROLS)
            raise Refused(f"byte {source.here + at} is a control character")
        source.position = len(source.data)
        if source.ended:
            return
        yield


_SPACE = re.compile(rb"[ \t\n\r]*+")
_ESCAPE = re.compile(rb'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_CHARACTERS = re.compile(rb'(?:[^"\\\x00-\x1f]++|%b)*+' % _ESCAPE.pattern)
_NUMBER = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
_SCALAR = re.compile(rb"%b|true|false|null" % _NUMBER)
_STRING = rb'"%b"' % _CHARACTERS.pattern


def _list(item: bytes) -> bytes:
    return rb"(?:%b[ \t\n\r]*+(?:,[ \t\n\r]*+%b[ \t\n\r]*+)*+)?" % (item, item)


def _shallow(value: bytes) -> bytes:
    """A value of that kind, or a container of such."""
    member = rb"%b[ \t\n\r]*+:[ \t\n\r]*+%b" % (_STRING, value)
    return rb"(?:%b|\[[ \t\n\r]*+%b\]|\{[ \t\n\r]*+%b\})" % (value, _list(value), _list(member))


# Runs of small items, which most of a document is; what is cut by the window, or deep, is read piece by piece.
_SMALL = _shallow(_shallow(rb"(?:%b|%b|true|false|null)" % (_STRING, _NUMBER)))
_ITEMS = re.compile(rb"(?:[ \t\n\r]*+%b[ \t\n\r]*+,)++" % _SMALL)
_MEMBERS = re.compile(rb"(?:[ \t\n\r]*+%b[ \t\n\r]*+:[ \t\n\r]*+%b[ \t\n\r]*+,)++" % (_STRING, _SMALL))
_SCALAR_BYTES_MAX = 1024
_ESCAPE_BYTES = 6


class TooMuch(Refused):
    """JSON as far as it was read, but more of it than is allowed: that is no text either."""


def json_walk(source: Source) -> Walk[None]:
    """Refuse what is no JSON document; TooMuch for one that is beyond the bounds."""
    opened = bytearray()
    while True:
        yield from _value(source, opened)
        # A value has ended: close what ends here, then the next one follows a comma, or nothing does.
        while True:
            byte = yield from _next_byte(source)
            _check_size(source)
            if not opened:
                if byte:
                    raise Refused("something follows the document")
                return
            source.position += 1
            if byte == b",":
                if opened[-1] == ord("{"):
                    yield from _key(source)
                else:
                    _pass_run(source, _ITEMS)
                break
            if byte + bytes(opened[-1:]) not in (b"}{", b"]["):
                raise Refused(f"at byte {source.here - 1} neither a comma nor an end")
            opened.pop()


def _value(source: Source, opened: bytearray) -> Walk[None]:
    """Pass a value, or the beginnings of values down to the first that is whole; an empty container's end is left."""
    while True:
        byte = yield from _next_byte(source)
        if byte == b'"':
            return (yield from _string(source))
        if byte not in (b"{", b"["):
            return (yield from _scalar(source))
        source.position += 1
        if len(opened) == JSON_DEPTH_MAX:
            raise TooMuch(f"a JSON document is nested deeper than {JSON_DEPTH_MAX}")
        opened += byte
        follows = yield from _next_byte(source)
        if follows == (b"}" if byte == b"{" else b"]"):
            return None
        _pass_run(source, _MEMBERS if byte == b"{" else _ITEMS)
        if byte == b"{":
            yield from _key(source)


def _check_size(source: Source) -> None:
    if source.here > JSON_BYTES_MAX:
        raise TooMuch(f"a JSON document has more than {JSON_BYTES_MAX} bytes")


def _pass_run(source: Source, run: re.Pattern[bytes]) -> None:
    while found := run.match(source.data, source.position, min(len(source.data), source.position + _WINDOW)):
        source.position = found.end()


def _key(source: Source) -> Walk[None]:
    _pass_run(source, _MEMBERS)
    if (yield from _next_byte(source)) != b'"':
        raise Refused(f"at byte {source.here} no name")
    yield from _string(source)
    if (yield from _next_byte(source)) != b":":
        raise Refused(f"at byte {source.here} no colon")
    source.position += 1


def _string(source: Source) -> Walk[None]:
    source.position += 1
    while True:
        found = _CHARACTERS.match(source.data, source.position, min(len(source.data), source.position + _WINDOW))
        if found is not None:
            source.position = found.end()
        _check_size(source)
        if not (yield from source.has(1)):
            raise Refused("it ends within a text")
        byte = source.data[source.position : source.position + 1]
        if byte == b'"':
            source.position += 1
            return
        if byte == b"\\":
            # Cut at the window's or the piece's end, or wrong: tell apart by having all of it.
            yield from source.has(_ESCAPE_BYTES)
            if not _ESCAPE.match(source.data, source.position):
                raise Refused(f"at byte {source.here} a wrong escape")
        elif byte < b" ":
            raise Refused(f"at byte {source.here} a control character in a text")


def _scalar(source: Source) -> Walk[None]:
    yield from source.has(_SCALAR_BYTES_MAX)
    found = _SCALAR.match(source.data, source.position, source.position + _SCALAR_BYTES_MAX)
    if found is None:
        raise Refused(f"at byte {source.here} no value")
    source.position = found.end()


def _next_byte(source: Source) -> Walk[bytes]:
    """The next byte behind white space, not consumed; b"" at the end."""
    while True:
        found = _SPACE.match(source.data, source.position)
        if found is not None:
            source.position = found.end()
        if source.position < len(source.data):
            return source.data[source.position : source.position + 1]
        if source.ended:
            return b""
        yield
