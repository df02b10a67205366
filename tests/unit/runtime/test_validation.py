"""protovalidate's verdicts as errors for people."""

import pytest

from mlmesh.registry.v1 import registry_pb2
from mlmesh_runtime.errors import InvalidInput
from mlmesh_runtime.validation import checker, shown

DESCRIPTORS = [method.input_type for method in registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"].methods]


@pytest.fixture(scope="module")
def check() -> object:
    return checker(DESCRIPTORS)


def test_a_good_request_passes(check) -> None:  # type: ignore[no-untyped-def]
    check(registry_pb2.GetModelRequest(name="models/mnist"))


def test_the_error_names_field_expectation_and_what_came(check) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput) as caught:
        check(registry_pb2.GetModelRequest(name="Models/Mnist"))
    assert caught.value.field == "name"
    assert "does not match regex" in caught.value.message
    assert "'Models/Mnist'" in caught.value.message
    assert caught.value.reason == "INVALID_FIELD"


def test_every_wrong_field_is_told_with_its_path(check) -> None:  # type: ignore[no-untyped-def]
    request = registry_pb2.CreateModelVersionRequest(
        parent="models/m",
        model_version=registry_pb2.ModelVersion(
            artifacts=[
                registry_pb2.Artifact(path="model.onnx", blob="blobs/sha256-" + "0" * 64),
                registry_pb2.Artifact(path="../etc/passwd", blob="nonsense"),
            ]
        ),
    )
    with pytest.raises(InvalidInput) as caught:
        check(request)
    fields = {violation.field for violation in caught.value.violations}
    assert {"model_version.artifacts[1].path", "model_version.artifacts[1].blob"} <= fields
    assert "more)" in caught.value.message


def test_values_are_shown_short_and_never_as_bytes() -> None:
    assert shown("abc") == "'abc'"
    assert shown(3) == "3"
    assert shown(b"secret") == "6 bytes"
    assert shown("x" * 1000).endswith("(1000 characters)")
    assert len(shown("x" * 1000)) < 100
    assert shown([1, 2]) == "2 items"
    assert shown(None) == "nothing"
    assert shown(registry_pb2.Model()) == "nothing"
    assert shown(registry_pb2.Model(name="models/m")) == "a Model"
