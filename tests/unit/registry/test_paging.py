"""Page tokens: they find their place again, and nothing else is taken for one."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry.paging import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, make_token, page_size, read_token
from mlmesh_runtime.errors import InvalidInput


@given(st.text(max_size=63), st.integers(-(2**63), 2**63 - 1))
def test_a_token_gives_its_key_back(text: str, number: int) -> None:
    assert read_token(make_token("q", text, number), "q", str, int) == (text, number)


def test_no_token_is_the_first_page() -> None:
    assert read_token("", "q", str) is None


@pytest.mark.parametrize(
    "token",
    [
        make_token("another", "a"),
        make_token("q", 1),
        make_token("q", "a", "b"),
        make_token("q", "a")[:-2],
        "!!!",
        "é",
        base64.urlsafe_b64encode(b"[" * 400).decode(),
        base64.urlsafe_b64encode(b"{}").decode(),
        base64.urlsafe_b64encode(b"1").decode(),
        base64.urlsafe_b64encode(json.dumps([None, "a"]).encode()).decode(),
    ],
)
def test_what_this_list_did_not_make_is_refused(token: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_token(token, "q", str)
    assert refused.value.field == "page_token"


def test_a_number_no_database_knows_is_refused() -> None:
    with pytest.raises(InvalidInput):
        read_token(make_token("q", 2**63), "q", int)


@given(st.text(max_size=100))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    try:
        read_token(text, "q", str)
    except InvalidInput:
        return


def test_sizes() -> None:
    assert page_size(0) == PAGE_SIZE_DEFAULT
    assert page_size(7) == 7
    assert page_size(10**6) == PAGE_SIZE_MAX
    with pytest.raises(InvalidInput):
        page_size(-1)
