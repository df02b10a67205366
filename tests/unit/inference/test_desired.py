"""Selectors against what the registry says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_inference.desired import (
    ModelFile,
    RegistryView,
    Selector,
    VersionRecord,
    Wanted,
    from_json,
    parse_selectors,
    signature_mismatch,
    to_json,
    wanted,
)
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec

DIGEST = "ab" * 32


def file(path: str = "model.onnx") -> ModelFile:
    return ModelFile(path=path, sha256=DIGEST, size=3)


def view(versions: dict[str, int], aliases: dict[str, int] | None = None) -> RegistryView:
    """A view with versions 1..n of each model and aliases "model@alias"."""
    result = RegistryView()
    for model, newest in versions.items():
        for number in range(1, newest + 1):
            result = result.with_version(VersionRecord(model=model, version=number, files=(file(),)), number)
    for key, number in (aliases or {}).items():
        model, alias = key.split("@")
        result = result.with_alias(model, alias, number, 50)
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("*@stable", (Selector(model="*", alias="stable"),)),
        ("mnist@canary, mnist/3", (Selector(model="mnist", alias="canary"), Selector(model="mnist", version=3))),
        ("mnist,*", (Selector(model="mnist"), Selector(model="*"))),
    ],
)
def test_selectors_are_read(text: str, expected: tuple[Selector, ...]) -> None:
    assert parse_selectors(text) == expected


@pytest.mark.parametrize(
    "text", ["Mnist", "*/3", "mnist/0", "mnist/x", "mnist@", "@stable", "a b", "mnist@Stable", "../x"]
)
def test_wrong_selectors_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="is none of") as caught:
        parse_selectors(f"ok@stable,{text}")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ("*@stable", {"a": Wanted(versions=(2,), default=2), "b": Wanted(versions=(1,), default=1)}),
        ("a@canary", {"a": Wanted(versions=(3,), default=3)}),
        ("a@stable,a@canary", {"a": Wanted(versions=(2, 3), default=2)}),
        ("a/1,a@stable", {"a": Wanted(versions=(1, 2), default=1)}),
        ("a,a/3", {"a": Wanted(versions=(3,), default=3)}),
        ("*", {"a": Wanted(versions=(3,), default=3), "b": Wanted(versions=(1,), default=1)}),
        ("a/9,missing@stable,b@canary", {}),
    ],
)
def test_what_is_wanted(selectors: str, expected: dict[str, Wanted]) -> None:
    said = view({"a": 3, "b": 1}, {"a@stable": 2, "a@canary": 3, "b@stable": 1})
    assert wanted(parse_selectors(selectors), said) == expected


def test_an_alias_to_a_version_that_is_not_there_gives_nothing() -> None:
    assert wanted(parse_selectors("*@stable"), view({"a": 1}, {"a@stable": 7})) == {}


def quarantined(said: RegistryView, model: str, number: int) -> RegistryView:
    record = VersionRecord(model=model, version=number, files=(file(),), quarantined=True)
    return said.with_version(record, said.revision + 1)


@pytest.mark.parametrize("selector", ["a@stable", "*@stable", "a/2"])
def test_what_must_not_be_served_is_not_even_when_there_is_nothing_else(selector: str) -> None:
    said = view({"a": 2}, {"a@stable": 2})
    selectors = parse_selectors(selector)
    assert wanted(selectors, said)["a"].default == 2
    assert wanted(selectors, quarantined(said, "a", 2)) == {}
    assert wanted(selectors, said.without_version("a", 2, 60)) == {}
    # Lifted, or brought back: as before.
    back = said.versions["a", 2]
    for gone in (quarantined(said, "a", 2), said.without_version("a", 2, 60)):
        assert wanted(selectors, gone.with_version(back, 70)) == wanted(selectors, said)


def test_the_newest_is_the_newest_that_may_be_served() -> None:
    said = view({"a": 3})
    assert wanted(parse_selectors("a"), quarantined(said, "a", 3)) == {"a": Wanted(versions=(2,), default=2)}
    assert wanted(parse_selectors("*"), said.without_version("a", 3, 9)) == {"a": Wanted(versions=(2,), default=2)}


def test_another_selector_takes_over_as_default() -> None:
    said = quarantined(view({"a": 3}, {"a@stable": 2, "a@canary": 3}), "a", 2)
    assert wanted(parse_selectors("a@stable,a@canary"), said) == {"a": Wanted(versions=(3,), default=3)}


def test_data_sets_are_passed_over() -> None:
    said = view({"a": 1, "data": 2}, {"data@stable": 1}).with_model("data", 60, servable=False)
    said = said.with_model("a", 61, servable=True)
    assert wanted(parse_selectors("*,data,data/1,*@stable"), said) == {"a": Wanted(versions=(1,), default=1)}
    # Purged, and its name taken by a model.
    assert "data" in wanted(parse_selectors("*"), said.with_model("data", 90, servable=True))


def test_a_deleted_alias_is_gone() -> None:
    said = view({"a": 1}, {"a@stable": 1}).without_alias("a", "stable", 60)
    assert wanted(parse_selectors("*@stable"), said) == {}
    assert said.revision == 60


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model.onnx"], "model.onnx"),
        (["other.onnx", "labels.txt"], "other.onnx"),
        (["other.onnx", "model.onnx"], "model.onnx"),
        (["a.onnx", "b.onnx"], None),
        (["weights.bin"], None),
    ],
)
def test_which_file_is_the_model(paths: list[str], expected: str | None) -> None:
    found = VersionRecord(model="m", version=1, files=tuple(map(file, paths))).model_file
    assert (found.path if found else None) == expected


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd", "a//b", "a/../b", "", ".hidden", "a/./b"])
def test_a_path_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a file"):
        file(path)


def test_a_digest_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not a file"):
        ModelFile(path="model.onnx", sha256="../../etc/passwd", size=1)


_SPEC = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=5),
    datatype=st.sampled_from(list(DATATYPES.values())),
    shape=st.lists(st.integers(-1, 9), max_size=4).map(tuple),
)
_SIGNATURE = st.builds(
    Signature, inputs=st.lists(_SPEC, max_size=3).map(tuple), outputs=st.lists(_SPEC, max_size=3).map(tuple)
)


@given(signature=st.none() | _SIGNATURE, revision=st.integers(0, 2**60))
def test_a_view_survives_the_disk(signature: Signature | None, revision: int) -> None:
    record = VersionRecord(model="m", version=3, files=(file(),), signature=signature, labels={"k": "v"})
    said = RegistryView().with_version(record, 1).with_alias("m", "stable", 3, revision)
    assert from_json(json.loads(json.dumps(to_json(said)))) == said
    more = quarantined(said, "m", 4).with_model("data", 9, servable=False)
    assert from_json(json.loads(json.dumps(to_json(more)))) == more
    # As it was kept before there were stages and data sets.
    old = to_json(said)
    del old["datasets"], old["versions"][0]["quarantined"]
    assert from_json(old) == said


def spec(name: str, kind: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=DATATYPES[kind], shape=shape)


@pytest.mark.parametrize(
    ("said", "found", "problem"),
    [
        (spec("x", "FP32", -1, 4), spec("x", "FP32", -1, 4), ""),
        (spec("x", "FP32", -1, -1), spec("x", "FP32", -1, 4), ""),
        (spec("x", "FP32", -1, 4), spec("y", "FP32", -1, 4), "['x']"),
        (spec("x", "FP32", -1, 4), spec("x", "FP64", -1, 4), "FP64"),
        (spec("x", "FP32", -1, 4), spec("x", "FP32", -1, 5), "[-1, 5]"),
        (spec("x", "FP32", -1, 4), spec("x", "FP32", -1, 4, 1), "[-1, 4, 1]"),
    ],
)
def test_a_signature_that_is_not_the_files_is_noticed(said: TensorSpec, found: TensorSpec, problem: str) -> None:
    text = signature_mismatch(Signature(inputs=(said,), outputs=()), Signature(inputs=(found,), outputs=()))
    assert problem in text
    assert bool(problem) == bool(text)
