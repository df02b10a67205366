"""Versions as values: their digest, and what may be published at all."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry.versions import (
    Artifact,
    Content,
    Lineage,
    Signature,
    TensorSpec,
    check_content,
    check_labels,
    content_from,
    digest,
    fingerprint,
    manifest,
)
from mlmesh_runtime.errors import InvalidInput

SHA = "ab" * 32
ONE = Content(artifacts=(Artifact(path="model.onnx", sha256=SHA, size_bytes=3, media_type="application/onnx"),))

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
contents = st.builds(
    Content,
    artifacts=st.lists(
        st.builds(
            Artifact,
            path=st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True),
            sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
            size_bytes=st.integers(0, 2**40),
            media_type=texts,
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda artifact: artifact.path,
    ).map(lambda found: tuple(sorted(found, key=lambda artifact: artifact.path))),
    signature=st.builds(
        Signature,
        inputs=st.lists(
            st.builds(
                TensorSpec,
                name=keys,
                datatype=st.sampled_from(["FP32", "INT64", "BYTES"]),
                shape=st.lists(st.integers(-1, 2**40), max_size=4).map(tuple),
            ),
            max_size=3,
            unique_by=lambda tensor: tensor.name,
        ).map(tuple),
    ),
    metrics=st.dictionaries(keys, st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    labels=st.dictionaries(keys, texts, max_size=4),
    lineage=st.builds(
        Lineage, job=texts, dataset=texts, parents=st.just(("models/m/versions/1",)), study=texts, source_uri=texts
    ),
    description=texts,
    model_card=texts,
)


@given(contents)
def test_a_manifest_holds_all_of_the_content(content: Content) -> None:
    assert check_content(content) is content
    assert content_from(manifest(content)) == content
    assert digest(content_from(manifest(content))) == digest(content)


def test_the_digest_does_not_depend_on_the_order_of_files_or_keys() -> None:
    files = (Artifact(path="a", sha256=SHA), Artifact(path="b", sha256=SHA))
    there = Content(artifacts=files, metrics={"x": 1.0, "y": 2.0}, labels={"a": "1", "b": "2"})
    back = Content(artifacts=files[::-1], metrics={"y": 2.0, "x": 1.0}, labels={"b": "2", "a": "1"})
    assert digest(there) == digest(back)


def test_the_digest_is_pinned() -> None:
    # Stored digests must mean the same for ever: a change of the canonical form is a new field, not a new value.
    assert digest(ONE) == "sha256-76eff7553fd632dc2f178418a280e1001a8f5393295f8041aa0f7bb85f85d11a"


@pytest.mark.parametrize(
    "change",
    [
        {"description": "other"},
        {"metrics": {"accuracy": 0.5}},
        {"labels": {"team": "a"}},
        {"lineage": Lineage(job="jobs/1")},
        {"lineage": Lineage(study="studies/1")},
        {"lineage": Lineage(source_uri="https://example.org/model")},
        {"model_card": "# Card"},
        {"signature": Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),))},
        {"artifacts": (Artifact(path="model.onnx", sha256="cd" * 32, size_bytes=3, media_type="application/onnx"),)},
    ],
)
def test_every_part_changes_the_digest(change: dict[str, object]) -> None:
    assert digest(dataclasses.replace(ONE, **change)) != digest(ONE)  # type: ignore[arg-type]


def _files(*paths: str) -> dict[str, object]:
    return {"artifacts": tuple(Artifact(path=path, sha256=SHA) for path in paths)}


def _input(**fields: object) -> dict[str, object]:
    tensor = TensorSpec(**{"name": "x", "datatype": "FP32", "shape": (1,), **fields})  # type: ignore[arg-type]
    return {"signature": Signature(inputs=(tensor,))}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"artifacts": ()}, "model_version.artifacts"),
        (_files("a", "a"), "model_version.artifacts[1].path"),
        (_files("a", "A"), "model_version.artifacts[1].path"),
        (_files("a", "a/b"), "model_version.artifacts"),
        (_files("../a"), "model_version.artifacts[0].path"),
        (_files(*(f"f{number}" for number in range(257))), "model_version.artifacts"),
        ({"artifacts": (Artifact(path="a", sha256="AB" * 32),)}, "model_version.artifacts[0].blob"),
        ({"metrics": {"loss": math.nan}}, "model_version.metrics"),
        ({"metrics": {"loss": math.inf}}, "model_version.metrics"),
        ({"labels": {"": "x"}}, "model_version.labels"),
        ({"labels": {"k": "v" * 4097}}, "model_version.labels"),
        ({"description": "a\0b"}, "model_version.description"),
        ({"model_card": "x" * 65537}, "model_version.model_card"),
        ({"lineage": Lineage(parents=("models/m",))}, "model_version.lineage.parents[0]"),
        ({"lineage": Lineage(study="s" * 257)}, "model_version.lineage.study"),
        ({"lineage": Lineage(source_uri="u" * 2049)}, "model_version.lineage.source_uri"),
        (_input(datatype="FLOAT"), "model_version.signature.inputs[0].datatype"),
        (_input(shape=(-2,)), "model_version.signature.inputs[0].shape"),
        (_input(shape=(1,) * 17), "model_version.signature.inputs[0].shape"),
        (_input(name=""), "model_version.signature.inputs[0].name"),
    ],
)
def test_what_cannot_be_published_names_its_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_content(dataclasses.replace(ONE, **change))  # type: ignore[arg-type]
    assert refused.value.field == field


def test_labels_are_bounded() -> None:
    assert check_labels({str(number): "" for number in range(64)})
    with pytest.raises(InvalidInput):
        check_labels({str(number): "" for number in range(65)})


def test_a_fingerprint_tells_parts_apart() -> None:
    assert fingerprint("a", "bc") != fingerprint("ab", "c")
    assert fingerprint("a", {"x": 1, "y": 2}) == fingerprint("a", {"y": 2, "x": 1})
