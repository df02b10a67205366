"""Names, labels and buckets of Istio's standard metrics, and of the few metrics about the metrics.

https://istio.io/latest/docs/reference/config/metrics/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

UNKNOWN: Final = "unknown"
CLUSTER_ID: Final = "Kubernetes"
"""Istio's name of the cluster where none is configured."""

PEER_LABELS: Final = (
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_canonical_service",
    "source_canonical_revision",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_cluster",
)
"""Who called whom: labels of every metric."""

TCP_LABELS: Final = (*PEER_LABELS, "request_protocol", "response_flags", "connection_security_policy")
HTTP_LABELS: Final = (
    *PEER_LABELS,
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
)

BUCKETS: Final = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000,
)  # fmt: skip
"""Upper bounds of every histogram, milliseconds or bytes: Envoy's defaults, which Istio leaves as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric. ``selector`` is its name in Telemetry's `metrics[].overrides[].match.metric`."""

    name: str
    selector: str
    kind: Literal["counter", "histogram"]
    labels: tuple[str, ...]
    help: str


STANDARD: Final = (
    Metric(
        name="istio_requests_total",
        selector="REQUEST_COUNT",
        kind="counter",
        labels=HTTP_LABELS,
        help="Requests that ended, HTTP and gRPC.",
    ),
    Metric(
        name="istio_request_duration_milliseconds",
        selector="REQUEST_DURATION",
        kind="histogram",
        labels=HTTP_LABELS,
        help="Time from the first byte of the request to the last byte of the response, milliseconds.",
    ),
    Metric(
        name="istio_request_bytes",
        selector="REQUEST_SIZE",
        kind="histogram",
        labels=HTTP_LABELS,
        help="Size of requests on the wire, bytes.",
    ),
    Metric(
        name="istio_response_bytes",
        selector="RESPONSE_SIZE",
        kind="histogram",
        labels=HTTP_LABELS,
        help="Size of responses on the wire, bytes.",
    ),
    Metric(
        name="istio_request_messages_total",
        selector="GRPC_REQUEST_MESSAGES",
        kind="counter",
        labels=PEER_LABELS,
        help="gRPC messages from clients; counts while a stream is open.",
    ),
    Metric(
        name="istio_response_messages_total",
        selector="GRPC_RESPONSE_MESSAGES",
        kind="counter",
        labels=PEER_LABELS,
        help="gRPC messages to clients; counts while a stream is open.",
    ),
    Metric(
        name="istio_tcp_sent_bytes_total",
        selector="TCP_SENT_BYTES",
        kind="counter",
        labels=TCP_LABELS,
        help="Bytes of responses over TCP connections; counts while a connection is open.",
    ),
    Metric(
        name="istio_tcp_received_bytes_total",
        selector="TCP_RECEIVED_BYTES",
        kind="counter",
        labels=TCP_LABELS,
        help="Bytes of requests over TCP connections; counts while a connection is open.",
    ),
    Metric(
        name="istio_tcp_connections_opened_total",
        selector="TCP_OPENED_CONNECTIONS",
        kind="counter",
        labels=TCP_LABELS,
        help="TCP connections opened.",
    ),
    Metric(
        name="istio_tcp_connections_closed_total",
        selector="TCP_CLOSED_CONNECTIONS",
        kind="counter",
        labels=TCP_LABELS,
        help="TCP connections closed.",
    ),
)
"""Istio's standard metrics, in the order in which they are shown."""

BY_SELECTOR: Final[Mapping[str, Metric]] = {metric.selector: metric for metric in STANDARD}

OWN: Final[Mapping[str, str]] = {
    "mlmesh_metrics_entries_total": "Access log entries taken from Envoys.",
    "mlmesh_metrics_dropped_total": "Entries that were not counted, by reason: too many label sets, an unknown proxy, "
    "or dropped by an Envoy whose stream was full.",
    "mlmesh_metrics_series": "Label sets kept.",
}
"""Metrics about the metrics; the laptop mesh alone has them."""
