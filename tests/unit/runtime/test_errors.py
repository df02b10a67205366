"""The error table: every error has a status, and comes back out of a status as it went in."""

import inspect

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from mlmesh_runtime import errors, status
from mlmesh_runtime.errors import FieldViolation, InvalidInput, MeshError, NotFound, Overloaded

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, MeshError) and kind is not MeshError
]


def over_the_wire(error: MeshError) -> MeshError:
    code, message, trailers = status.to_status(error)
    return status.mesh_error(
        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=message)
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_comes_back(kind: type[MeshError]) -> None:
    code = status.CODES[kind]
    assert code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
    back = over_the_wire(kind("one sentence", reason="SOME_REASON", metadata={"size": "3"}))
    assert type(back) is kind
    assert (back.message, back.reason, dict(back.metadata)) == ("one sentence", "SOME_REASON", {"size": "3"})


def test_no_two_errors_share_a_status() -> None:
    assert len(set(status.CODES.values())) == len(status.CODES) == len(KINDS)


def test_a_subclass_has_its_parents_status() -> None:
    class ModelGone(NotFound):
        default_reason = "MODEL_GONE"

    assert status.code_of(ModelGone("gone")) is grpc.StatusCode.NOT_FOUND
    assert over_the_wire(ModelGone("gone")).reason == "MODEL_GONE"


def test_details_are_google_rpc_messages() -> None:
    error = InvalidInput("spec.epochs: expected at least 1; got 0", field="spec.epochs")
    _, _, ((key, raw),) = status.to_status(error)
    assert key == "grpc-status-details-bin"
    assert isinstance(raw, bytes)
    sent = status_pb2.Status.FromString(raw)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert sent.details[0].Unpack(info)
    assert sent.details[1].Unpack(bad)
    assert (info.domain, info.reason) == ("mlmesh", "INVALID_FIELD")
    assert [v.field for v in bad.field_violations] == ["spec.epochs"]


@pytest.mark.parametrize(("retry_after_s", "told"), [(0.25, "250"), (0.0001, "1"), (0.0, "0"), (1e9, "2147483647")])
def test_what_is_overloaded_tells_grpc_when_to_retry(retry_after_s: float, told: str) -> None:
    _, _, trailers = status.to_status(Overloaded("full", retry_after_s=retry_after_s))
    assert dict(trailers)["grpc-retry-pushback-ms"] == told


def test_nothing_else_asks_grpc_to_wait() -> None:
    for error in (Overloaded("full", retry_after_s=None), NotFound("gone", retry_after_s=3.0)):
        assert [key for key, _ in status.to_status(error)[2]] == ["grpc-status-details-bin"]


def test_violations_and_retry_delay_come_back() -> None:
    violations = [FieldViolation(field="a", description="x"), FieldViolation(field="b", description="y")]
    back = over_the_wire(InvalidInput("two wrong", violations=violations))
    assert isinstance(back, InvalidInput)
    assert back.violations == tuple(violations)
    assert over_the_wire(Overloaded("full", retry_after_s=0.25)).retry_after_s == 0.25
    assert over_the_wire(NotFound("no")).retry_after_s is None


def test_what_is_told_is_bounded() -> None:
    many = [FieldViolation(field="ü" * 9000, description="d" * 9000) for _ in range(1000)]
    huge = InvalidInput("\u4f60" * 100_000, violations=many, metadata={str(i): "v" * 9000 for i in range(100)})
    _, message, ((_, raw),) = status.to_status(huge)
    # Trailers near 8 KiB would replace the error by a transport failure.
    assert isinstance(raw, bytes)
    assert len(message.encode()) * 3 + len(raw) * 4 / 3 < 7500
    assert over_the_wire(huge).reason == "INVALID_FIELD"


def test_a_foreign_status_is_still_typed() -> None:
    proxy = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "no healthy host"
    )
    back = status.mesh_error(proxy)
    assert type(back) is errors.NotReady
    assert back.reason == "NOT_READY"
    garbled = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    unknown = grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), garbled, "what")
    assert status.mesh_error(unknown).reason == "UNKNOWN"


def test_groups_with_one_cause_are_unwrapped() -> None:
    cause = NotFound("no")
    assert status.single_cause(ExceptionGroup("g", [ExceptionGroup("h", [cause])])) is cause
    assert status.single_cause(ExceptionGroup("g", [cause, Overloaded("full")])) is cause
    mixed = ExceptionGroup("g", [cause, RuntimeError("bug")])
    assert status.single_cause(mixed) is mixed


def test_errors_module_imports_nothing_of_ours() -> None:
    source = inspect.getsource(errors)
    assert "import grpc" not in source
    assert "from mlmesh" not in source
