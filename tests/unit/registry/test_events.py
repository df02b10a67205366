"""Changes survive their stored form."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry.events import Change, DeletedAlias, decode, encode, from_micros, to_micros
from mlmesh_registry.versions import Alias, Artifact, Content, Model, Version, digest

TIME = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
CONTENT = Content(artifacts=(Artifact(path="model.onnx", sha256="ab" * 32, size_bytes=5),), metrics={"f1": 0.1 + 0.2})
SUBJECTS = [
    Model(id="m", description="d", labels={"a": "b"}, create_time=TIME, update_time=TIME, revision=3),
    Version(
        model="m", number=2, content=CONTENT, digest=digest(CONTENT), create_time=TIME, creator="spiffe://x", revision=4
    ),
    Alias(model="m", alias="stable", version=2, update_time=TIME, updater="", revision=5),
    DeletedAlias(model="m", alias="stable", version=2),
]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_stored_change_is_the_same_change(subject: Model | Version | Alias | DeletedAlias) -> None:
    kind, plain = encode(subject)
    assert decode(kind, json.loads(json.dumps(plain))) == subject
    assert Change(revision=1, time=TIME, actor="", subject=subject).model == "m"


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind"):
        decode("other", {})


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_are_exact(time: datetime) -> None:
    assert from_micros(to_micros(time)) == time
