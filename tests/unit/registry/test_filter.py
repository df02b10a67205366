"""The language of filters: what is understood, and what a refusal says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry import filter as language
from mlmesh_registry.filter import DEPTH_MAX, TERMS_MAX, All, Any, Expression, Literal, Not, Restriction, Word, parse
from mlmesh_registry.ordering import Order, parse_order
from mlmesh_runtime.errors import InvalidInput


def plain(expression: Expression | None) -> object:
    """An expression as nested tuples, easy on the eye."""
    match expression:
        case None:
            return None
        case Word(value=value):
            return spelled(value)
        case Restriction(field=field, operator=operator, value=value):
            return (field, operator, spelled(value))
        case Not(part=part):
            return ("not", plain(part))
        case All(parts=parts):
            return ("all", *map(plain, parts))
        case Any(parts=parts):
            return ("any", *map(plain, parts))


def spelled(value: Literal) -> str:
    return value.text if not (value.open_start or value.open_end) else f"~{value.name}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        (" \t\n", None),
        ("prod", "prod"),
        ('"two words"', "two words"),
        ("model.onnx", "model.onnx"),
        ("package=com.google", ("package", "=", "com.google")),
        ("msg != 'hello'", ("msg", "!=", "hello")),
        ("a<1", ("a", "<", "1")),
        ("a >= 2.5", ("a", ">=", "2.5")),
        ("a > -1e-9", ("a", ">", "-1e-9")),
        ("labels:team", ("labels", ":", "team")),
        ("a.b.c:*", ("a.b.c", ":", "~*")),
        ('labels."my.key" = x', ("labels.my.key", "=", "x")),
        ("labels.AND = x", ("labels.AND", "=", "x")),
        ("t > 2012-04-21T11:30:00-04:00", ("t", ">", "2012-04-21T11:30:00-04:00")),
        ("p:models/m/versions/3", ("p", ":", "models/m/versions/3")),
        ("a = spiffe://x/y", ("a", "=", "spiffe://x/y")),
        # OR binds tighter than AND, and than things side by side.
        ("a b AND c", ("all", "a", "b", "c")),
        ("a AND b OR c", ("all", "a", ("any", "b", "c"))),
        ("New York Giants OR Yankees", ("all", "New", "York", ("any", "Giants", "Yankees"))),
        ("(a AND b) OR c", ("any", ("all", "a", "b"), "c")),
        ("NOT (a OR b)", ("not", ("any", "a", "b"))),
        ('-file:".java"', ("not", ("file", ":", ".java"))),
        ("-30", ("not", "30")),
        ("NOT a AND -b", ("all", ("not", "a"), ("not", "b"))),
        ("NOTE OR ORDER", ("any", "NOTE", "ORDER")),
        ("x = (a OR b)", ("any", ("x", "=", "a"), ("x", "=", "b"))),
        ("x:(a AND NOT -1)", ("all", ("x", ":", "a"), ("not", ("x", ":", "-1")))),
        # Stars at the ends stand for any text, escaped ones for themselves.
        ('d = "*.foo"', ("d", "=", "~*.foo")),
        ("d = foo*", ("d", "=", "~foo*")),
        ('d = "*"', ("d", "=", "~*")),
        ('d = "**"', ("d", "=", "~*")),
        (r'd = "a\*"', ("d", "=", "a*")),
        (r'd = "a\\*"', ("d", "=", "~a\\*")),
        (r'd = "a*b"', ("d", "=", "a*b")),
        (r'd = "say \"hi\""', ("d", "=", 'say "hi"')),
        ("d = 'it\\'s'", ("d", "=", "it's")),
        ('d = ""', ("d", "=", "")),
    ],
)
def test_understood(text: str, expected: object) -> None:
    assert plain(parse(text)) == expected


@pytest.mark.parametrize(
    ("text", "position", "expected", "found"),
    [
        ("a AND", 6, "behind AND", "the end"),
        ("AND", 1, "a field or a value", "'AND'"),
        ("a OR", 5, "behind OR", "the end"),
        ("OR a", 1, "a field or a value", "'OR'"),
        ("a AND OR b", 7, "a field or a value", "'OR'"),
        ("NOT", 4, "behind NOT", "the end"),
        ("-", 2, "a field or a value", "the end"),
        ("(a", 3, "a closing bracket", "the end"),
        ("a)", 2, "the end", "')'"),
        ("()", 2, "a field or a value", "')'"),
        ("a <", 4, "a value", "the end"),
        ("a = AND", 5, "a value", "'AND'"),
        ("a == b", 4, "a value", "'='"),
        ("a = b = c", 7, "a field or a value", "'='"),
        ('a = "x', 5, "a quote that closes", "none"),
        ("a = 'x\"", 5, "a quote that closes", "none"),
        ("f(x)", 2, "functions are not supported", "'('"),
        ("a, b", 2, "a field or a value", "','"),
        ("a.", 3, "the name of a field", "the end"),
        ("a..b", 3, "the name of a field", "'.'"),
        ("a = b\0", 6, "text", "a NUL character"),
        ("\\", 1, "a field or a value", "'\\\\'"),
        ("x" * 2049, 1, "at most 2048 characters", "2049"),
        ("a = " + "x" * 600, 5, "at most 512 characters", "600"),
        ("(" * (DEPTH_MAX + 1) + "a", DEPTH_MAX + 1, f"at most {DEPTH_MAX} deep", "more"),
        (" ".join(["a"] * (TERMS_MAX + 1)), 2 * TERMS_MAX + 1, f"at most {TERMS_MAX} terms", "more"),
        (f"a = ({' OR '.join(['b'] * 65)})", 6 + 64 * 5, "at most 64 terms", "more"),
    ],
)
def test_refused_with_the_place(text: str, position: int, expected: str, found: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(text)
    error = refused.value
    assert (error.reason, error.field) == ("INVALID_FILTER", "filter")
    assert error.metadata["position"] == str(position), error.message
    assert expected in error.metadata["expected"]
    assert error.metadata["found"] == found
    assert f"at character {position}: expected" in error.message


@given(st.text(max_size=60))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        parse(text)
    except InvalidInput as error:
        assert error.message.isprintable()  # noqa: PT017  what is tested is that there is no other outcome


@given(st.text(alphabet="ab()\"'\\*.:=<>!-, \tANDORNOT", max_size=40))
def test_any_text_like_a_filter_is_understood_or_refused(text: str) -> None:
    try:
        parse(text)
    except InvalidInput as error:
        position = int(error.metadata["position"])
        assert 1 <= position <= len(text) + 1


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_a_quoted_text_is_itself(text: str) -> None:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("*", "\\*")
    assert parse(f'a = "{escaped}"') == Restriction(
        path=("a",), operator="=", value=Literal(text=text, position=5), position=1
    )


def test_orders() -> None:
    assert parse_order(" ") == ()
    assert parse_order("metrics.accuracy desc, create_time") == (
        Order(path=("metrics", "accuracy"), descending=True),
        Order(path=("create_time",), descending=False),
    )
    assert parse_order('labels."k k" ASC') == (Order(path=("labels", "k k"), descending=False),)


@pytest.mark.parametrize(
    "text", ["a,", ",", "a b", "a desc desc", "a.", '"', "a, a desc", "a,b,c,d,e", "x" * 300, "a;b desc c"]
)
def test_orders_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_order(text)
    assert refused.value.field == "order_by"


def test_the_module_says_what_it_raises() -> None:
    assert "INVALID_FILTER" in (language.__doc__ or "")
