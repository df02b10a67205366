"""Load reports by ORCA, for balancers that weigh by load: gRPC's and Envoy's weighted round robin.

Out of band, `xds.service.orca.v3.OpenRcaService` streams reports to whoever asks. In band, a report goes with the
trailers of a call (`endpoint-load-metrics-bin`). By gRFC A51 there is nothing to negotiate: a server either attaches
reports to all calls or to none, so a setting decides. By the same document a stream's first report comes at once, and
intervals below the server's least are taken for it.

The messages are those of cncf/xds (`xds/data/orca/v3/orca_load_report.proto`, `xds/service/orca/v3/orca.proto`;
Apache-2.0), field by field, in a descriptor pool of their own: `xds-protos` registers the same names in the default
pool, and both may be in one process.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, duration_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from mlmesh_runtime.errors import InvalidInput

SERVICE: Final = "xds.service.orca.v3.OpenRcaService"
METHOD: Final = "StreamCoreMetrics"
TRAILER: Final = "endpoint-load-metrics-bin"
INTERVAL_LEAST_S: Final = 1.0
"""gRFC A51 lets a server choose; ours are cheap enough to tell every second."""
INTERVAL_MOST_S: Final = 3600.0
NAMES_MAX: Final = 128
"""Entries of each map of a report; the first by name are kept."""

_DATA: Final = "xds/data/orca/v3/orca_load_report.proto"
_DOUBLE, _UINT64, _STRING, _MESSAGE = 1, 4, 9, 11
_OPTIONAL, _REPEATED = 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """How loaded this process is. 0 is not reported, as on the wire.

    Attributes:
        utilization: what balancers weigh by: 1 is fully used, more is overloaded.
        cpu, memory: share of what the process may use. rate_per_s, errors_per_s: requests ended, and failed.
        utilizations: by name, each from 0 to 1. metrics: by name, whatever they mean.
    """

    utilization: float = 0.0
    cpu: float = 0.0
    memory: float = 0.0
    rate_per_s: float = 0.0
    errors_per_s: float = 0.0
    utilizations: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


Trailers = tuple[tuple[str, bytes], ...]


def _data_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name=_DATA, package="xds.data.orca.v3", syntax="proto3")
    report = file.message_type.add(name="OrcaLoadReport")
    fields = (
        ("cpu_utilization", 1, _DOUBLE),
        ("mem_utilization", 2, _DOUBLE),
        ("rps", 3, _UINT64),
        ("rps_fractional", 6, _DOUBLE),
        ("eps", 7, _DOUBLE),
        ("application_utilization", 9, _DOUBLE),
    )
    for name, number, kind in fields:
        report.field.add(name=name, number=number, type=kind, label=_OPTIONAL)
    for name, number in (("request_cost", 4), ("utilization", 5), ("named_metrics", 8)):
        entry = report.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=_STRING, label=_OPTIONAL)
        entry.field.add(name="value", number=2, type=_DOUBLE, label=_OPTIONAL)
        type_name = f".xds.data.orca.v3.OrcaLoadReport.{entry.name}"
        report.field.add(name=name, number=number, type=_MESSAGE, label=_REPEATED, type_name=type_name)
    return file


def _service_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/service/orca/v3/orca.proto", package="xds.service.orca.v3", syntax="proto3"
    )
    file.dependency.extend(["google/protobuf/duration.proto", _DATA])
    request = file.message_type.add(name="OrcaLoadReportRequest")
    duration = ".google.protobuf.Duration"
    request.field.add(name="report_interval", number=1, type=_MESSAGE, label=_OPTIONAL, type_name=duration)
    request.field.add(name="request_cost_names", number=2, type=_STRING, label=_REPEATED)
    service = file.service.add(name="OpenRcaService")
    service.method.add(
        name=METHOD,
        input_type=".xds.service.orca.v3.OrcaLoadReportRequest",
        output_type=".xds.data.orca.v3.OrcaLoadReport",
        server_streaming=True,
    )
    return file


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    for file in (_data_file(), _service_file()):
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL: Final = _pool()
DESCRIPTOR: Final = _POOL.FindServiceByName(SERVICE)
OrcaLoadReport: Final[Any] = message_factory.GetMessageClass(
    _POOL.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport")
)
OrcaLoadReportRequest: Final[Any] = message_factory.GetMessageClass(
    _POOL.FindMessageTypeByName("xds.service.orca.v3.OrcaLoadReportRequest")
)


def encode(report: LoadReport) -> bytes:
    """The message's bytes. What is no number or below 0 is left out; shares above 1 are 1."""
    message = OrcaLoadReport(
        cpu_utilization=_number(report.cpu),
        mem_utilization=min(_number(report.memory), 1.0),
        rps_fractional=_number(report.rate_per_s),
        eps=_number(report.errors_per_s),
        application_utilization=_number(report.utilization),
    )
    for name, value in sorted(report.utilizations.items())[:NAMES_MAX]:
        message.utilization[name] = min(_number(value), 1.0)
    for name, value in sorted(report.metrics.items())[:NAMES_MAX]:
        message.named_metrics[name] = _number(value)
    return bytes(message.SerializeToString(deterministic=True))


def _number(value: float) -> float:
    return value if math.isfinite(value) and value > 0 else 0.0


class LoadReporter:
    """Reports for calls and streams, made anew at most every `age_s` seconds.

    Args:
        report: looks how loaded the process is; quick. clock: seconds of a clock that never goes back.
    """

    def __init__(
        self, report: Callable[[], LoadReport], *, age_s: float = 0.5, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = report
        self._age_s = age_s
        self._clock = clock
        self._until = -math.inf
        self._trailers: Trailers = ()

    def trailers(self) -> Trailers:
        """The report as trailing metadata."""
        now = self._clock()
        if now >= self._until:
            self._until = now + self._age_s
            self._trailers = ((TRAILER, encode(self._report())),)
        return self._trailers

    def encoded(self) -> bytes:
        """The report as a message."""
        return self.trailers()[0][1]


class OrcaServicer:
    """xds.service.orca.v3.OpenRcaService over a reporter."""

    def __init__(self, reporter: LoadReporter, *, least_s: float = INTERVAL_LEAST_S) -> None:
        self._reporter = reporter
        self._least_s = least_s

    async def StreamCoreMetrics(self, request: Any, _context: Any) -> AsyncIterator[bytes]:
        """A report at once, then one an interval, until the caller goes or the server drains (UNAVAILABLE)."""
        seconds = 0.0
        if request.HasField("report_interval"):
            try:
                seconds = request.report_interval.ToNanoseconds() / 1e9
            except ValueError as error:
                raise InvalidInput(f"report_interval: {error}", field="report_interval") from None
        interval_s = min(max(seconds, self._least_s), INTERVAL_MOST_S)
        while True:
            yield self._reporter.encoded()
            await asyncio.sleep(interval_s)


def add_to_server(servicer: OrcaServicer, server: Any) -> None:
    """Register the service, as a generated `add_…_to_server` would."""
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.StreamCoreMetrics, OrcaLoadReportRequest.FromString, lambda encoded: encoded
    )
    server.add_registered_method_handlers(SERVICE, {METHOD: handler})
