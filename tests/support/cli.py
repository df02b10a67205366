"""Messages and servicers for tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from mlmesh.local.v1 import local_pb2

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
HOST = "inference.mlmesh.svc.cluster.local"


def at(seconds: float) -> Timestamp:
    """A time so many seconds after NOW."""
    result = Timestamp()
    result.FromNanoseconds(round((NOW.timestamp() + seconds) * 1e9))
    return result


class FakeServicer:
    """Answers by the functions put into it: (request or iterator, context) → response or iterator. Notes requests."""

    def __init__(self) -> None:
        self._answers: dict[str, Callable[[Any, Any], Any]] = {}
        self.requests: dict[str, list[Any]] = {}

    def __setitem__(self, method: str, answer: Callable[[Any, Any], Any]) -> None:
        self._answers[method] = answer

    def __getattr__(self, method: str) -> Callable[[Any, Any], Any]:
        if not method[:1].isupper():
            raise AttributeError(method)

        def call(request: Any, context: Any) -> Any:
            self.requests.setdefault(method, []).append(request)
            if method not in self._answers:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} was not expected")
            return self._answers[method](request, context)

        return call


def instance(name: str, **fields: Any) -> local_pb2.Instance:
    """A ready replica."""
    workload = name.rsplit("-", 1)[0]
    made = local_pb2.Instance(
        name=name,
        workload=workload,
        namespace="mlmesh",
        identity=f"spiffe://cluster.local/ns/mlmesh/sa/{workload}",
        state=local_pb2.INSTANCE_STATE_READY,
        address="127.64.1.1:9000",
        application_pid=101,
        sidecar_pid=102,
        certificate_expire_time=at(23 * 3600),
        certificate_serial="0a1b2c",
        acked_version="7",
    )
    made.MergeFrom(local_pb2.Instance(**fields))
    return made


def mesh_status() -> local_pb2.MeshStatus:
    """A mesh of two instances, ready, with traffic at 90/10."""
    status = local_pb2.MeshStatus(
        instances=[
            instance("inference-v1-0", labels={"app": "inference", "version": "v1"}),
            instance("toolbox-0"),
        ],
        gateways=[local_pb2.GatewayAddress(gateway="mlmesh/mlmesh", address="127.0.0.1:8443", tls_mode="MUTUAL")],
        config_version="7",
        trust_domain="cluster.local",
        start_time=at(-90),
        supervisor_pid=100,
        ca_expire_time=at(86_400 * 30),
        ready=True,
    )
    status.instances[1].outbound_listeners.add(address="127.64.3.2:9000", port=9000)
    status.shares.add(host=HOST, subset="v1", configured_share=0.9, observed_share=0.905, requests=905)
    status.shares.add(host=HOST, subset="v2", configured_share=0.1, observed_share=0.095, requests=95, failures=2)
    return status


def span(
    span_id: str, parent: str = "", *, start_s: float = 0.0, took_s: float = 0.001, **fields: Any
) -> local_pb2.Span:
    """A span that begins so many seconds after NOW."""
    made = local_pb2.Span(span_id=span_id, parent_span_id=parent, start_time=at(start_s), name=span_id, **fields)
    made.duration.FromNanoseconds(round(took_s * 1e9))
    return made
