"""Whether a text is an expression of CEL, by its syntax (https://github.com/google/cel-spec); Envoy evaluates it."""

from __future__ import annotations

import re

DEPTH_MAX = 100
"""Most expressions inside each other."""

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)
    |(?P<value>[rRbB]{0,2}(?:'{3}(?:\\.|[^\\])*?'{3}|"{3}(?:\\.|[^\\])*?"{3}|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")
        |0[xX][0-9a-fA-F]+[uU]?|(?:[0-9]+\.[0-9]+|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[0-9]+[uU]?
        |(?:true|false|null)\b)
    |(?P<binary>&&|\|\||[=!<>]=|[<>+*/%]|in\b)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign>[-!?:.,()\[\]{}])""",
    re.VERBOSE | re.DOTALL,
)
_END = ("end", "", 0)


def cel_problem(expression: str) -> str:
    """What is wrong with the syntax of an expression, or empty."""
    if not expression.strip():
        return "must be a CEL expression, such as response.code >= 400"
    try:
        _Reader(expression).all()
    except ValueError as error:
        return f"is not a valid CEL expression: {error}"
    return ""


class _Reader:
    """Precedence does not matter to whether it is one."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []
        self._depth = 0
        self._before: tuple[str, ...] = ()
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                why = "is not closed" if text[at] in "'\"" else "is not part of the language"
                raise ValueError(f"{text[at]} at column {at + 1} {why}")
            if found.lastgroup != "skip":
                self._tokens.append((str(found.lastgroup), found.group(), at + 1))
            at = found.end()
        self._tokens.reverse()

    def all(self) -> None:
        self._expression()
        if self._tokens:
            self._fail("the end or an operator")

    def _pop(self) -> None:
        self._before = (*self._before[-1:], self._tokens.pop()[1])

    def _next(self) -> tuple[str, str, int]:
        return self._tokens[-1] if self._tokens else _END

    def _take(self, *signs: str) -> bool:
        if self._next()[0] != "value" and self._next()[1] in signs and self._tokens:
            self._pop()
            return True
        return False

    def _need(self, sign: str) -> None:
        if not self._take(sign):
            self._fail(f'"{sign}"')

    def _fail(self, wanted: str) -> None:
        _, text, column = self._next()
        place = f'"{text}" at column {column}' if column else "it ends"
        raise ValueError(f"{place} where {wanted} should be")

    def _expression(self) -> None:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise ValueError(f"more than {DEPTH_MAX} expressions inside each other")
        self._unary()
        while self._next()[0] == "binary" or self._next()[1] == "-":
            self._pop()
            self._unary()
        if self._take("?"):
            self._expression()
            self._need(":")
            self._expression()
        self._depth -= 1

    def _unary(self) -> None:
        sign = self._next()[1]
        while sign in ("!", "-") and self._take(sign):
            pass
        has = self._next()[1] == "has"
        self._primary()
        if has and self._take("("):
            self._selection()
        while True:
            if self._take("."):
                self._name()
            elif self._take("["):
                self._expression()
                self._need("]")
            elif self._take("("):
                self._arguments()
            elif self._take("{"):
                self._items("}", pairs=True)
            else:
                return

    def _selection(self) -> None:
        """What `has` asks about: a field of something."""
        self._expression()
        if self._before[:1] != (".",):
            raise ValueError("has() asks about a field, such as has(request.time)")
        self._need(")")

    def _arguments(self) -> None:
        if self._take(")"):
            return
        self._expression()
        while self._take(","):
            self._expression()
        self._need(")")

    def _primary(self) -> None:
        if self._take("("):
            self._expression()
            self._need(")")
        elif self._take("["):
            self._items("]")
        elif self._take("{"):
            self._items("}", pairs=True)
        elif self._next()[0] == "value":
            self._pop()
        else:
            self._take(".")
            self._name()

    def _name(self) -> None:
        if self._next()[0] != "name":
            self._fail("a value")
        self._pop()

    def _items(self, end: str, *, pairs: bool = False) -> None:
        while not self._take(end):
            self._expression()
            if pairs:
                self._need(":")
                self._expression()
            if not self._take(","):
                self._need(end)
                return
