"""Logs: one JSON object a line on stderr (or text for people), with the ids of the trace being handled."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import IO, Any

from opentelemetry import trace

from mlmesh_runtime import telemetry
from mlmesh_runtime.calls import CURRENT
from mlmesh_runtime.config import Settings

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(settings: Settings, stream: IO[str] | None = None) -> None:
    """Send every log of the process to `stream` (stderr), in the format that the settings ask for."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(settings) if settings.log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    # These tell what ours tell better; celpy at debug would even tell the values of requests.
    for name in ("opentelemetry", "grpc", "alembic", "asyncio", "celpy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Export errors repeat every batch while a collector is away; the first of them says enough.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)


def trace_ids() -> tuple[str, str]:
    """(trace id, span id) in hex of the span or, unsampled, of the request being handled; empty when there is none."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        call = CURRENT.get()
        header = call.header("traceparent") if call is not None else None
        if header is None:
            return "", ""
        context = trace.get_current_span(telemetry.extract(header, None)).get_span_context()
        if not context.is_valid:
            return "", ""
    return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)


class JsonFormatter(logging.Formatter):
    """Keys: time, level, logger, event (the message), service, pod, trace_id, span_id, `extra`, exception."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._service, self._pod = settings.service, settings.pod_name

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "service": self._service,
        }
        if self._pod:
            entry["pod"] = self._pod
        trace_id, span_id = trace_ids()
        if trace_id:
            entry["trace_id"], entry["span_id"] = trace_id, span_id
        entry.update(_extra(record))
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`12:00:00.123 info    logger  event  key=value …`, then the exception."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        fields = dict(_extra(record))
        if trace_id := trace_ids()[0]:
            fields["trace_id"] = trace_id
        tail = "".join(f"  {key}={value}" for key, value in fields.items())
        line = f"{time} {record.levelname.lower():<7} {record.name}  {record.getMessage()}{tail}"
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
