"""The language of filters: AIP-160 (google.aip.dev/160) text to an expression. Pure.

What the grammar says and people do not expect: OR binds tighter than AND, things side by side are joined by AND, a
minus before something is NOT. Functions are not supported. An argument without quotes goes on to the next space or
bracket, so times, numbers and resource names need no quotes. `*` at the start or end of an argument stands for any
text; `\\*` is a star.

Errors: InvalidInput (INVALID_FILTER) that tells the position in characters from 1, what was expected and what came.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from mlmesh_runtime.errors import InvalidInput

FILTER_CHARS_MAX = 2048
LITERAL_CHARS_MAX = 512
DEPTH_MAX = 16
TERMS_MAX = 64

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"' + r"|'((?:[^'\\]|\\.)*)'", re.DOTALL)
_TEXT = re.compile(r"[^\s().,:<>=!\"'\\-][^\s().,:<>=!\"'\\]*")
_ARGUMENT = re.compile(r"[^\s(),<>=!\"'\\]+")
_COMPARATOR = re.compile(r"<=|>=|!=|[<>=:]")
_KEYWORDS = frozenset({"AND", "OR", "NOT"})
_SHOWN_CHARS_MAX = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Literal:
    """A value as written, without its quotes and escapes.

    Attributes:
        text: its characters, without the stars at its ends.
        open_start, open_end: whether a star stood there, for any text; of a lone star both, with empty text.
        position: of its first character in the filter, from 1.
    """

    text: str
    open_start: bool = False
    open_end: bool = False
    position: int = 1

    @property
    def anything(self) -> bool:
        """Whether it is a lone star."""
        return self.open_start and not self.text

    @property
    def name(self) -> str:
        """As a name, in which a star is a star."""
        if self.anything:
            return "*"
        return "*" * self.open_start + self.text + "*" * self.open_end


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A value alone, looked for wherever the list says."""

    value: Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """A field compared with a value; the operator is one of = != < <= > >= and : (has)."""

    path: tuple[str, ...]
    operator: str
    value: Literal
    position: int = 1

    @property
    def field(self) -> str:
        """The path as people write it."""
        return ".".join(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Not:
    """True where its part is not."""

    part: "Expression"


@dataclass(frozen=True, slots=True, kw_only=True)
class All:
    """True where every part is."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Any:
    """True where some part is."""

    parts: tuple["Expression", ...]


Expression = Word | Restriction | Not | All | Any


def parse(text: str) -> Expression | None:
    """Expression of a filter, None of an empty one."""
    if len(text) > FILTER_CHARS_MAX:
        refuse(1, f"at most {FILTER_CHARS_MAX} characters", f"{len(text)}")
    if (at := text.find("\0")) >= 0:
        refuse(at + 1, "text", "a NUL character")
    return _Parser(text).whole()


def refuse(position: int, expected: str, found: str) -> NoReturn:
    """Raise the error of a wrong filter."""
    raise InvalidInput(
        f"filter: at character {position}: expected {expected}, found {found}",
        field="filter",
        reason="INVALID_FILTER",
        metadata={"position": str(position), "expected": expected, "found": found},
    )


def shown(text: str) -> str:
    """Text as an error may show it: short, and nothing that moves a terminal's cursor."""
    return ascii(text if len(text) <= _SHOWN_CHARS_MAX else text[:_SHOWN_CHARS_MAX] + "...")


class _Parser:
    """Recursive descent over the text; `_at` is the next character."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._terms = 0

    def whole(self) -> Expression | None:
        self._skip()
        if self._ended:
            return None
        found = self._expression(self._restriction)
        if not self._ended:
            self._refuse("the end, AND or OR")
        return found

    def _expression(self, leaf: Callable[[], Expression]) -> Expression:
        """{ sequence AND } sequence; a sequence's factors are joined by AND, too."""
        parts = [self._factor(leaf)]
        while not self._ended and self._peek() != ")":
            if self._keyword("AND"):
                self._skip()
            parts.append(self._factor(leaf))
        return parts[0] if len(parts) == 1 else All(parts=tuple(parts))

    def _factor(self, leaf: Callable[[], Expression]) -> Expression:
        parts = [self._term(leaf)]
        while self._keyword("OR"):
            parts.append(self._term(leaf))
        return parts[0] if len(parts) == 1 else Any(parts=tuple(parts))

    def _term(self, leaf: Callable[[], Expression]) -> Expression:
        if self._keyword("NOT"):
            return Not(part=self._simple(leaf))
        if self._peek() == "-" and leaf == self._restriction:
            self._at += 1
            return Not(part=self._simple(leaf))
        return self._simple(leaf)

    def _simple(self, leaf: Callable[[], Expression]) -> Expression:
        if self._peek() != "(":
            self._terms += 1
            if self._terms > TERMS_MAX:
                refuse(self._at + 1, f"at most {TERMS_MAX} terms", "more")
            return leaf()
        self._depth += 1
        if self._depth > DEPTH_MAX:
            refuse(self._at + 1, f"brackets at most {DEPTH_MAX} deep", "more")
        self._at += 1
        self._skip()
        found = self._expression(leaf)
        if self._peek() != ")":
            self._refuse("a closing bracket")
        self._at += 1
        self._skip()
        self._depth -= 1
        return found

    def _restriction(self) -> Expression:
        position = self._at + 1
        first = self._value("a field or a value")
        path = [first.name]
        while self._peek() == ".":
            self._at += 1
            path.append(self._value("the name of a field", keywords=True).name)
        if self._peek() == "(":
            self._refuse("a comparison: functions are not supported")
        self._skip()
        comparator = _COMPARATOR.match(self._text, self._at)
        if comparator is None:
            if len(path) == 1:
                return Word(value=first)
            return Word(value=self._unescaped(".".join(path).replace("\\", "\\\\"), position))
        self._at = comparator.end()
        self._skip()

        def compared() -> Expression:
            return Restriction(path=tuple(path), operator=comparator[0], value=self._argument(), position=position)

        # The grammar's `field = (a OR b)`; what is inside counts as terms, this one did already.
        if self._peek() == "(":
            self._terms -= 1
            return self._simple(compared)
        return compared()

    def _argument(self) -> Literal:
        if (string := self._string()) is not None:
            return string
        position = self._at + 1
        found = _ARGUMENT.match(self._text, self._at)
        if found is None or found[0] in _KEYWORDS:
            self._refuse("a value")
        self._at = found.end()
        self._skip()
        return self._unescaped(found[0], position)

    def _value(self, expected: str, *, keywords: bool = False) -> Literal:
        """TEXT or STRING, and the space behind a TEXT only where nothing can follow it."""
        if (string := self._string(skip=False)) is not None:
            return string
        position = self._at + 1
        found = _TEXT.match(self._text, self._at)
        if found is None or (found[0] in _KEYWORDS and not keywords):
            self._refuse(expected)
        self._at = found.end()
        return self._unescaped(found[0], position)

    def _string(self, *, skip: bool = True) -> Literal | None:
        if self._peek() not in ("'", '"'):
            return None
        position = self._at + 1
        found = _STRING.match(self._text, self._at)
        if found is None:
            refuse(position, "a quote that closes the one here", "none")
        self._at = found.end()
        if skip:
            self._skip()
        return self._unescaped(found[1] if found[1] is not None else found[2], position)

    def _unescaped(self, raw: str, position: int) -> Literal:
        value = Literal(text="", position=position)
        if raw.startswith("*"):
            value, raw = replace(value, open_start=True), raw[1:]
            if not raw:
                return replace(value, open_end=True)
        # A star at the end is escaped when an odd number of backslashes stands before it.
        if raw.endswith("*") and (len(raw) - 1 - len(raw[:-1].rstrip("\\"))) % 2 == 0:
            value, raw = replace(value, open_end=True), raw[:-1]
        text = re.sub(r"\\(.)", r"\1", raw, flags=re.DOTALL)
        if len(text) > LITERAL_CHARS_MAX:
            refuse(position, f"a value of at most {LITERAL_CHARS_MAX} characters", f"{len(text)}")
        return replace(value, text=text)

    @property
    def _ended(self) -> bool:
        return self._at >= len(self._text)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _peek_keyword(self) -> str:
        found = _TEXT.match(self._text, self._at)
        return found[0] if found is not None and found[0] in _KEYWORDS else ""

    def _keyword(self, keyword: str) -> bool:
        if self._peek_keyword() != keyword:
            return False
        after = self._at + len(keyword)
        # `AND.x` and `OR:y` are fields called so.
        if not (behind := self._text[after : after + 1]) or not (behind.isspace() or behind in "(\"'"):
            if not behind:
                self._at = after
                self._refuse(f"a value or a field behind {keyword}")
            return False
        self._at = after
        self._skip()
        return True

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None  # noqa: S101  it matches nothing, too
        self._at = found.end()

    def _refuse(self, expected: str) -> NoReturn:
        rest = self._text[self._at :]
        token = re.match(r"[\w-]+|.", rest, re.DOTALL)
        refuse(self._at + 1, expected, shown(token[0]) if token else "the end")
