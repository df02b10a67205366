"""Names: what has the right form comes back as it went in, everything else is refused."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlmesh_registry import names
from mlmesh_registry.names import AliasName, VersionName
from mlmesh_runtime.errors import InvalidInput

HOSTILE = [
    "",
    ".",
    "..",
    "../etc",
    "/etc/passwd",
    "a/../b",
    "a\0b",
    "mnist\n",
    "Mnist",
    "-x",
    "m" * 64,
    "a.b",
    "a%2e%2e",
    "file:#",
    "․․",  # noqa: RUF001  one-dot leaders, which look like dots
    "ｍnist",  # noqa: RUF001  a full-width letter
    "a\\b",
]
model_ids = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
alias_ids = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)
numbers = st.integers(min_value=1, max_value=10**18 - 1)


@given(model_ids, alias_ids, numbers)
def test_what_is_formatted_parses_back(model: str, alias: str, number: int) -> None:
    assert names.parse_model(names.model_name(model)) == model
    version = VersionName(model=model, number=number)
    assert names.parse_version(str(version)) == version == names.parse_version_or_alias(str(version))
    moving = AliasName(model=model, alias=alias)
    assert names.parse_alias(str(moving)) == moving == names.parse_version_or_alias(str(moving))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_ids_are_refused_in_every_place(text: str) -> None:
    for parse, name in (
        (names.model_id, text),
        (names.parse_model, f"models/{text}"),
        (names.parse_version, f"models/{text}/versions/1"),
        (names.parse_version_or_alias, f"models/m/aliases/{text}"),
        (names.parse_blob, f"blobs/sha256-{text}"),
    ):
        with pytest.raises(InvalidInput) as refused:
            parse(name)
        assert refused.value.reason == "INVALID_FIELD"


@pytest.mark.parametrize("name", ["models/m/versions/0", "models/m/versions/01", "models/m/versions/-1", "models/m"])
def test_version_numbers_have_one_spelling(name: str) -> None:
    with pytest.raises(InvalidInput):
        names.parse_version(name)


def test_a_dash_means_all_models_only_where_a_parent_is_asked() -> None:
    assert names.parse_parent("models/-") is None
    assert names.parse_parent("models/m") == "m"
    with pytest.raises(InvalidInput):
        names.parse_model("models/-")


@given(st.text(max_size=40))
@example("a/b/../c")
@example("a//b")
@example("a/.hidden")
@example("CON/nul.txt")
def test_an_artifact_path_is_refused_or_stays_inside(text: str) -> None:
    try:
        path = names.artifact_path(text, "path")
    except InvalidInput:
        return
    assert path == text
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part) for part in path.split("/"))


def test_an_artifact_path_has_at_most_255_characters() -> None:
    assert names.artifact_path("a" * 255, "path")
    with pytest.raises(InvalidInput):
        names.artifact_path("a" * 256, "path")


@given(st.binary(min_size=1, max_size=80))
def test_only_lower_case_hex_of_the_right_length_is_a_digest(data: bytes) -> None:
    text = data.hex()
    if len(text) == 64:
        assert names.parse_blob(f"blobs/sha256-{text}") == text
    else:
        with pytest.raises(InvalidInput):
            names.parse_blob(f"blobs/sha256-{text}")
