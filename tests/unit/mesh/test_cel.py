"""Filters of access logs are refused where they are no CEL, as Istio refuses them."""

from __future__ import annotations

import pytest

from mlmesh_local.resources.cel import cel_problem


@pytest.mark.parametrize(
    "expression",
    [
        "response.code >= 400",
        "response.code >= 400 || response.grpc_status != 0 // errors",
        "connection.mtls && request.url_path.contains('v1beta3')",
        "!has(request.headers.a) ? request.method in ['GET', \"POST\"] : -1 < 2",
        "xds.cluster_name == 'BlackHoleCluster' || (request.duration > duration('1s'))",
        "size({'a': 1, 'b': [1.5e3, .5, 0x1F, 2u]}) == 2",
        "request.headers.exists(h, h.startsWith(r'x-\\d'))",
        "a.b.Type{field: 1}.field - 1 == 0",
        "'it\\'s' != '''it's'''",
        "null == true",
    ],
)
def test_expressions(expression: str) -> None:
    assert cel_problem(expression) == ""


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("response.code >=>= 400", '">=" at column 17 where a value should be'),
        ("response.code = 400", "= at column 15 is not part of the language"),
        ("response.code >=", "it ends where a value should be"),
        ("response code", '"code" at column 10 where the end or an operator should be'),
        ("(a == 1", 'it ends where ")" should be'),
        ("a == 'b", "' at column 6 is not closed"),
        ("a ? b", 'it ends where ":" should be'),
        ("a == 1)", '")" at column 7'),
        ("{1: 2, 3}", 'where ":" should be'),
        ("a and b", '"and" at column 3'),
        ("has(a['b'])", "has() asks about a field"),
        ("f(a,)", '")" at column 5 where a value should be'),
        ("!-a", '"-" at column 2'),
        ("a..b", '"." at column 3'),
        ("  ", "must be a CEL expression"),
        ("(" * 200, "inside each other"),
    ],
)
def test_what_is_no_expression(expression: str, says: str) -> None:
    assert says in cel_problem(expression)
