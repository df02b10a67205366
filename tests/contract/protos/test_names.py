"""Conventions that buf does not know: standard methods, pages, idempotency, resource names (AIP-121 to AIP-158)."""

from __future__ import annotations

import re

import pytest
from google.protobuf import descriptor_pb2

from tests.support import contract

METHODS = {m.full_name: m for m in contract.methods()}
# Lists whose length is bounded by what is installed or configured, not by what users create.
SHORT_LISTS = {
    "mlmesh.inference.v1.InferenceControlService/ListEngines",
    "mlmesh.inference.v1.InferenceControlService/ListServedVersions",
    "mlmesh.local.v1.LocalMeshService/ListFaults",
    "mlmesh.local.v1.LocalMeshService/ListResources",
    "mlmesh.local.v1.LocalMeshService/ListRoutes",
    "mlmesh.local.v1.LocalMeshService/ListTraces",
    "mlmesh.registry.v1.ModelRegistryService/ListModelVersionSignatures",
    "mlmesh.training.v1.TrainingService/ListDatasets",
    "mlmesh.training.v1.TrainingService/ListRecipes",
}
VERBS = (
    "Add", "Apply", "Build", "Cancel", "Collect", "Create", "Delete", "Download", "Finish", "Get", "Inject", "Issue",
    "List", "Move", "Pause", "Remove", "Report", "Restart", "Resume", "Retry", "Rotate", "Set", "Shutdown", "Start",
    "Stop", "Undelete", "Update", "Upload", "Verify", "Watch",
)  # fmt: skip


def _message(type_name: str) -> descriptor_pb2.DescriptorProto:
    return contract.messages()[type_name]


def _fields(type_name: str) -> dict[str, descriptor_pb2.FieldDescriptorProto]:
    return {f.name: f for f in _message(type_name).field}


def test_there_are_methods() -> None:
    assert len(METHODS) > 30


@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_is_a_verb_we_use_and_says_what_it_promises(name: str) -> None:
    method = METHODS[name]
    assert method.name.startswith(VERBS)
    # A comment that starts with the method's name and is a sentence, and more than the name again.
    assert method.comment.strip().startswith(method.name)
    assert len(method.comment.split()) >= 6
    assert method.comment.strip().endswith(".")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_reads_say_that_they_are_idempotent(name: str) -> None:
    method = METHODS[name]
    if method.name.startswith(("Get", "List")):
        assert "dempotent" in method.comment


@pytest.mark.parametrize("name", sorted(METHODS))
def test_streams_say_what_ends_them(name: str) -> None:
    method = METHODS[name]
    if method.descriptor.server_streaming:
        assert re.search(r"\bends?\b", method.comment)


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.name.startswith("List")))
def test_lists_come_in_pages(name: str) -> None:
    method = METHODS[name]
    request, reply = _fields(method.descriptor.input_type), _fields(method.descriptor.output_type)
    repeated = [f for f in reply.values() if f.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED]
    assert len(repeated) == 1
    if name not in SHORT_LISTS:
        assert {"page_size", "page_token"} <= set(request)
        assert "next_page_token" in reply


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.name.startswith(("Create", "Start"))))
def test_creating_is_retry_safe(name: str) -> None:
    assert "request_id" in _fields(METHODS[name].descriptor.input_type)
    assert "request_id" in METHODS[name].comment


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.name.startswith(("Update", "Set"))))
def test_updating_is_compare_and_set(name: str) -> None:
    assert "etag" in _fields(METHODS[name].descriptor.input_type)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_requests_that_people_write_have_no_bytes(name: str) -> None:
    method = METHODS[name]
    if method.descriptor.client_streaming:
        return
    for field in _message(method.descriptor.input_type).field:
        assert field.type != descriptor_pb2.FieldDescriptorProto.TYPE_BYTES, field.name


@pytest.mark.parametrize("name", sorted(contract.messages()))
def test_times_and_units(name: str) -> None:
    for field in _message(name).field:
        if field.name == "time" or field.name.endswith("_time"):
            assert field.type_name == ".google.protobuf.Timestamp", field.name
        # A number of seconds in a field's name is a Duration that was not one.
        assert not re.search(r"_(s|ms|seconds|millis)$", field.name), field.name
        if field.type_name == ".google.protobuf.Timestamp":
            assert field.name == "time" or field.name.endswith("_time"), field.name
