"""Regular expressions as RE2 takes them, which Envoy uses, checked with the means of Python."""

from __future__ import annotations

import re
import warnings

LENGTH_MAX = 1024
"""Istio's bound: larger programs could exceed what Envoy takes."""

_REPEAT_MAX = 1000
_GROUP = re.compile(r"\(\?(?P<kind>P<|P=|P>|<=|<!|<|=|!|>|\(|#|:|[a-zA-Z-]+[:)]|.?)")
_POSSESSIVE = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})(?:[+*]|\?[?*+])")
_COUNTED = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_FLAGS = re.compile(r"^(?=.)[imsU]*(?:-[imsU]+)?[:)]$")
# Escapes of RE2 by those of Python that take the same place; what they match does not matter here.
_SAME = {"z": r"\Z", "C": ".", "pN": r"\w", "Q": ""}


def regex_problem(text: str) -> str:
    """What is wrong with a regular expression, or empty."""
    if not text:
        return "must not be empty"
    if len(text) > LENGTH_MAX:
        return f"is longer than {LENGTH_MAX} characters"
    try:
        python = _as_python(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(python)
    except (re.error, OverflowError, RecursionError) as error:
        return f'"{text}" is not a regular expression: {error}'
    except _NotRe2Error as error:
        return f'"{text}" uses {error}, which Envoy (RE2) does not have'
    return ""


class _NotRe2Error(Exception):
    """The name of what RE2 does not have."""


def _as_python(text: str) -> str:
    """The same expression in Python's syntax. Raises _NotRe2Error."""
    result: list[str] = []
    place = 0
    while place < len(text):
        char = text[place]
        if char == "\\":
            piece, place = _escape(text, place)
        elif char == "[":
            piece, place = _set(text, place)
        elif char == "(" and text.startswith("(?", place):
            piece, place = _group(text, place)
        elif char in "*+?{":
            piece, place = _repeat(text, place)
        else:
            piece, place = char, place + 1
        result.append(piece)
    return "".join(result)


def _escape(text: str, place: int) -> tuple[str, int]:
    following = text[place + 1 : place + 2]
    if following in "123456789" and following:
        raise _NotRe2Error("look-around or back-references")
    if following == "Q":
        end = text.find("\\E", place)
        end = len(text) if end < 0 else end
        return re.escape(text[place + 2 : end]), min(end + 2, len(text))
    if following in "pP" and following:
        match = re.compile(r"\\[pP](?:[A-Z]|\{\^?\w+\})").match(text, place)
        if match is None:
            raise _NotRe2Error(f"the class {text[place : place + 4]}")
        return r"\w", match.end()
    if following in ("Z", "G", "K", "h", "H", "R", "X"):
        raise _NotRe2Error(f"\\{following}")
    if following == "x" and text.startswith("{", place + 2):
        end = text.find("}", place)
        return "x", end + 1 if end > 0 else len(text)
    return _SAME.get(following, text[place : place + 2]), place + 2


def _set(text: str, place: int) -> tuple[str, int]:
    """A set of characters, up to its bracket; named classes inside become letters."""
    end = place + 1
    inside: list[str] = []
    if text.startswith("^", end):
        inside.append("^")
        end += 1
    if text.startswith("]", end):
        inside.append("\\]")
        end += 1
    while end < len(text) and text[end] != "]":
        if text.startswith("[:", end) and ":]" in text[end:]:
            end = text.index(":]", end) + 2
            inside.append("a-z")
        elif text[end] == "\\":
            piece, end = _escape(text, end)
            inside.append(piece)
        else:
            inside.append("\\[" if text[end] == "[" else text[end])
            end += 1
    return "[" + "".join(inside) + text[end : end + 1], end + 1


def _group(text: str, place: int) -> tuple[str, int]:
    match = _GROUP.match(text, place)
    kind = match["kind"] if match else ""
    if kind in ("P<", ":"):
        return match[0] if match else "", place + 2 + len(kind)
    if kind == "<":
        return "(?P<", place + 3
    if kind in ("=", "!", "<=", "<!", "P=", "P>"):
        raise _NotRe2Error("look-around or back-references")
    if _FLAGS.match(kind):
        # What flags change does not matter here.
        return "(?:" + (")" if kind.endswith(")") else ""), place + 2 + len(kind)
    raise _NotRe2Error(f"(?{kind}")


def _repeat(text: str, place: int) -> tuple[str, int]:
    match = _POSSESSIVE.match(text, place)
    if match is not None:
        raise _NotRe2Error(f"the repetition {match[0]}")
    counted = _COUNTED.match(text, place)
    if counted is None:
        return text[place], place + 1
    if max(int(number) for number in counted.groups() if number) > _REPEAT_MAX:
        raise _NotRe2Error(f"the repetition {counted[0]}")
    return counted[0], counted.end()
