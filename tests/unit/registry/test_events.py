"""Changes survive their stored form."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry.conditions import DigestVerified, Gate, HeldAlias, MetricBounds, SignatureCompatible
from mlmesh_registry.events import (
    Change,
    DeletedAlias,
    DeletedModel,
    DeletedVersion,
    Subject,
    decode,
    encode,
    from_micros,
    to_micros,
)
from mlmesh_registry.versions import Alias, Artifact, Content, Lineage, Model, Version, digest

TIME = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
CONTENT = Content(artifacts=(Artifact(path="model.onnx", sha256="ab" * 32, size_bytes=5),), metrics={"f1": 0.1 + 0.2})
MODEL = Model(id="m", description="d", labels={"a": "b"}, create_time=TIME, update_time=TIME, revision=3)
VERSION = Version(
    model="m",
    number=2,
    content=CONTENT,
    digest=digest(CONTENT),
    create_time=TIME,
    creator="spiffe://x",
    revision=4,
    meta_revision=4,
)
LATER = TIME + timedelta(days=30, microseconds=1)
SUBJECTS: list[Subject] = [
    MODEL,
    replace(
        MODEL,
        kind="DATASET",
        gates=(
            Gate(id="a", aliases=("stable",), condition=MetricBounds(metric="accuracy", min_value=0.9)),
            Gate(id="b", condition=DigestVerified(max_age=timedelta(hours=1, microseconds=3))),
            Gate(id="c", condition=HeldAlias(alias="canary", min_age=timedelta(days=1))),
            Gate(id="d", condition=SignatureCompatible()),
        ),
    ),
    VERSION,
    replace(VERSION, stage="QUARANTINED", stage_reason="bad", meta_revision=9, verify_time=TIME, corrupt_time=LATER),
    replace(VERSION, content=replace(CONTENT, model_card="# Card", lineage=Lineage(study="studies/s"))),
    DeletedModel(model=replace(MODEL, delete_time=TIME, purge_time=LATER)),
    DeletedVersion(
        model="m", number=2, digest=VERSION.digest, revision=4, meta_revision=7, delete_time=TIME, purge_time=LATER
    ),
    Alias(model="m", alias="stable", version=2, update_time=TIME, updater="", revision=5),
    DeletedAlias(model="m", alias="stable", version=2),
]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_stored_change_is_the_same_change(subject: Subject) -> None:
    kind, plain = encode(subject)
    assert decode(kind, json.loads(json.dumps(plain))) == subject
    assert Change(revision=1, time=TIME, actor="", subject=subject).model == "m"


def test_what_was_stored_before_there_were_stages_and_gates_is_read() -> None:
    later = {"stage", "stage_reason", "meta_revision", "verify_time", "corrupt_time", "delete_time", "purge_time"}
    version = {key: value for key, value in encode(VERSION)[1].items() if key not in later}
    assert decode("version", version) == VERSION
    model = {key: value for key, value in encode(MODEL)[1].items() if key not in later | {"kind", "gates"}}
    assert decode("model", model) == MODEL


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind"):
        decode("other", {})


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_are_exact(time: datetime) -> None:
    assert from_micros(to_micros(time)) == time
