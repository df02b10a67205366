"""Values of labels that Telemetry adds: the part of CEL that tag overrides are written in.

    compile_expression("request.headers['x-model'] + '/' + request.method")

Literals, attributes, `headers['name']`, `+`, `==`, `!=`, `&&`, `||`, `!`, `a ? b : c`, `string(x)`, `has(x)`,
`x.startsWith(y)`, `x.endsWith(y)`, `x.contains(y)` and parentheses; https://github.com/google/cel-spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlmesh_local.metrics.calls import HttpCall

Value = str | int | bool | None
_Get = Callable[[HttpCall], Value]

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'[^']*'|"[^"]*")|(?P<number>\d+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign>&&|\|\||[=!]=|[-+?:().!\[\],]))"""
)
_METHODS: dict[str, Callable[[str, str], bool]] = {
    "startsWith": str.startswith,
    "endsWith": str.endswith,
    "contains": str.__contains__,
}

ATTRIBUTES: dict[str, _Get] = {
    "request.host": lambda call: call.authority,
    "request.method": lambda call: call.method,
    "request.path": lambda call: call.path,
    "request.url_path": lambda call: call.path.partition("?")[0],
    "request.useragent": lambda call: call.user_agent or None,
    "request.total_size": lambda call: call.received_bytes,
    "response.code": lambda call: call.code,
    "response.grpc_status": lambda call: call.grpc_status if call.grpc_status >= 0 else None,
    "response.total_size": lambda call: call.sent_bytes,
    "destination.port": lambda call: call.destination_port or None,
    "connection.mtls": lambda call: bool(call.peers.downstream_peer),
    "connection.uri_san_peer_certificate": lambda call: call.peers.downstream_peer or None,
    "connection.uri_san_local_certificate": lambda call: call.peers.downstream_local or None,
    "upstream.uri_san_peer_certificate": lambda call: call.peers.upstream_peer or None,
    "xds.cluster_name": lambda call: call.peers.cluster or None,
    "xds.route_name": lambda call: call.peers.route or None,
}
"""Attributes that expressions may use, besides `request.headers['name']` and `response.headers['name']`."""


class ExpressionError(ValueError):
    """An expression that cannot be understood; the message says where."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression. Equal sources are equal."""

    source: str

    def text(self, call: HttpCall) -> str:
        """Its value as the text of a label; empty where an attribute has none."""
        value = _compiled(self.source)[0](call)
        if value is None:
            return ""
        return str(value).lower() if isinstance(value, bool) else str(value)

    @property
    def request_headers(self) -> frozenset[str]:
        """Headers of requests that it reads."""
        return frozenset(name for side, name in _compiled(self.source)[1] if side == "request")

    @property
    def response_headers(self) -> frozenset[str]:
        """Headers of responses that it reads."""
        return frozenset(name for side, name in _compiled(self.source)[1] if side == "response")


def compile_expression(source: str) -> Expression:
    """Check an expression. Raises ExpressionError."""
    _compiled(source)
    return Expression(source)


_Compiled = tuple[_Get, frozenset[tuple[str, str]]]
_cache: dict[str, _Compiled] = {}
_CACHE_MAX = 1000
TOKENS_MAX = 256
DEPTH_MAX = 32
"""Envoy's CEL takes no deeper nesting, either."""


def _compiled(source: str) -> _Compiled:
    found = _cache.get(source)
    if found is None:
        if len(_cache) >= _CACHE_MAX:
            _cache.clear()
        parser = _Parser(source)
        found = _cache[source] = (parser.whole(), frozenset(parser.headers))
    return found


class _Parser:
    def __init__(self, source: str) -> None:
        self._tokens = _tokens(source)
        self._next = 0
        self._depth = 0
        self.headers: set[tuple[str, str]] = set()

    def whole(self) -> _Get:
        result = self._choice()
        if self._next < len(self._tokens):
            raise ExpressionError(f'"{self._tokens[self._next]}" is not expected there')
        return result

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self, *signs: str) -> str:
        if signs and self._peek() not in signs:
            raise ExpressionError(f'{" or ".join(signs)} is missing before "{self._peek() or "the end"}"')
        if self._next >= len(self._tokens):
            raise ExpressionError("it ends too early")
        self._next += 1
        return self._tokens[self._next - 1]

    def _choice(self) -> _Get:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise ExpressionError(f"it is nested more than {DEPTH_MAX} deep")
        result = self._chosen()
        self._depth -= 1
        return result

    def _chosen(self) -> _Get:
        condition = self._or()
        if self._peek() != "?":
            return condition
        self._take("?")
        first = self._choice()
        self._take(":")
        second = self._choice()
        return lambda call: first(call) if condition(call) is True else second(call)

    def _or(self) -> _Get:
        left = self._and()
        while self._peek() == "||":
            self._take()
            left = _either(left, self._and())
        return left

    def _and(self) -> _Get:
        left = self._equal()
        while self._peek() == "&&":
            self._take()
            left = _both(left, self._equal())
        return left

    def _equal(self) -> _Get:
        left = self._sum()
        while self._peek() in ("==", "!="):
            left = _equality(left, self._take() == "==", self._sum)
        return left

    def _sum(self) -> _Get:
        left = self._unary()
        while self._peek() == "+":
            self._take()
            left = _plus(left, self._unary())
        return left

    def _unary(self) -> _Get:
        if self._peek() == "!":
            self._take()
            inner = self._unary()
            return lambda call: inner(call) is not True
        return self._methods(self._primary())

    def _methods(self, value: _Get) -> _Get:
        while self._peek() == ".":
            self._take()
            name = self._take()
            if name not in _METHODS:
                raise ExpressionError(f'"{name}" is not one of {", ".join(_METHODS)}')
            self._take("(")
            argument = self._choice()
            self._take(")")
            value = _method(_METHODS[name], value, argument)
        return value

    def _primary(self) -> _Get:
        word = self._take()
        if word == "(":
            inner = self._choice()
            self._take(")")
            return inner
        if word[0] in "'\"":
            text = word[1:-1]
            return lambda _call: text
        if word.isdigit():
            number = int(word)
            return lambda _call: number
        if word in ("true", "false"):
            truth = word == "true"
            return lambda _call: truth
        if word in ("string", "has") and self._peek() == "(":
            self._take()
            inner = self._choice()
            self._take(")")
            return _as_text(inner) if word == "string" else (lambda call: inner(call) not in (None, ""))
        if word[0].isalpha():
            return self._attribute(word)
        raise ExpressionError(f'"{word}" is not expected there')

    def _attribute(self, first: str) -> _Get:
        name = first
        while self._peek() == "." and self._following() not in _METHODS:
            self._take()
            name += "." + self._take()
            if name in ("request.headers", "response.headers"):
                self._take("[")
                header = self._take().strip("'\"").lower()
                self._take("]")
                return self._header(name.partition(".")[0], header)
        found = ATTRIBUTES.get(name)
        if found is None:
            known = ", ".join([*ATTRIBUTES, "request.headers['name']", "response.headers['name']"])
            raise ExpressionError(f'"{name}" is not an attribute that the laptop mesh knows: {known}')
        return found

    def _following(self) -> str:
        return self._tokens[self._next + 1] if self._next + 1 < len(self._tokens) else ""

    def _header(self, side: str, name: str) -> _Get:
        self.headers.add((side, name))
        if side == "request":
            return lambda call: dict(call.headers).get(name)
        return lambda call: dict(call.response_headers).get(name)


def _tokens(source: str) -> list[str]:
    found: list[str] = []
    position = 0
    while source[position:].strip():
        match = _TOKEN.match(source, position)
        if match is None:
            raise ExpressionError(f'"{source[position:].strip()[:20]}" is not understood')
        found.append(match.group().strip())
        if len(found) > TOKENS_MAX:
            raise ExpressionError(f"it has more than {TOKENS_MAX} parts")
        position = match.end()
    if not found:
        raise ExpressionError("it is empty")
    return found


def _both(left: _Get, right: _Get) -> _Get:
    return lambda call: left(call) is True and right(call) is True


def _either(left: _Get, right: _Get) -> _Get:
    return lambda call: left(call) is True or right(call) is True


def _equality(left: _Get, same: bool, read: Callable[[], _Get]) -> _Get:
    right = read()
    return lambda call: (left(call) == right(call)) is same


def _plus(left: _Get, right: _Get) -> _Get:
    def add(call: HttpCall) -> Value:
        one, two = left(call), right(call)
        if isinstance(one, str) and isinstance(two, str):
            return one + two
        if isinstance(one, int) and isinstance(two, int):
            return one + two
        return None

    return add


def _method(method: Callable[[str, str], bool], value: _Get, argument: _Get) -> _Get:
    def apply(call: HttpCall) -> Value:
        one, two = value(call), argument(call)
        return method(one, two) if isinstance(one, str) and isinstance(two, str) else None

    return apply


def _as_text(inner: _Get) -> _Get:
    def text(call: HttpCall) -> Value:
        value = inner(call)
        return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return text
