"""What a stream's answers look like beside those of unary calls: parts, empty ends, errors in their place."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from mlmesh_inference.oip import replies
from mlmesh_inference.oip.infer import Prepared, failure
from mlmesh_inference.running import Answer
from mlmesh_runtime.errors import InvalidInput, MeshError
from mlmesh_runtime.status import InternalError, code_of
from mlmesh_runtime.telemetry import REGISTRY
from open_inference import grpc_service_pb2 as pb

_LOG = logging.getLogger(__name__)


class _Messages(Collector):
    """Counts stream messages by how they were answered. Plain numbers: they are read when metrics are."""

    def __init__(self) -> None:
        self.by_code: Counter[str] = Counter()

    def collect(self) -> list[CounterMetricFamily]:
        """See prometheus_client."""
        family = CounterMetricFamily(
            "mlmesh_inference_stream_messages",
            "Messages of inference streams by how they were answered, in place: a status code.",
            labels=("code",),
        )
        for code, count in list(self.by_code.items()):
            family.add_metric((code,), count)
        return [family]


MESSAGES: Final = _Messages()
REGISTRY.register(MESSAGES)


def part(prepared: Prepared, item: Answer) -> pb.ModelStreamInferResponse:
    """One of several answers of a decoupled model."""
    response = replies.write(
        prepared.id, prepared.request, prepared.model, item.arrays, outputs=item.outputs, final=False
    )
    return pb.ModelStreamInferResponse(infer_response=response)


def empty(prepared: Prepared) -> pb.ModelStreamInferResponse:
    """The end of a decoupled model's answers, for clients that want to be told."""
    reply = pb.ModelStreamInferResponse()
    last = reply.infer_response
    last.id, last.model_name, last.model_version = prepared.id, prepared.model.name, prepared.model.version_text
    last.parameters[replies.FINAL].bool_param = True
    return reply


def failed(name: str, model: str, error: MeshError, *, details: bool) -> pb.ModelStreamInferResponse:
    """An error in the place of an answer; `details`: with its code and reason, for clients that know to look."""
    MESSAGES.by_code[code_of(error).name] += 1
    reply = failure(name, model, error)
    if details:
        parameters = reply.infer_response.parameters
        parameters["mlmesh_code"].string_param = code_of(error).name
        parameters["mlmesh_reason"].string_param = error.reason
        if isinstance(error, InvalidInput) and error.violations:
            parameters["mlmesh_field"].string_param = error.violations[0].field
        if error.retry_after_s is not None:
            parameters["mlmesh_retry_after_ms"].int64_param = max(0, round(error.retry_after_s * 1000))
    return reply


def unexpected_error(error: Exception | None) -> InternalError:
    """What a caller is told of an exception that nobody foresaw; the log has the rest."""
    fixed = InternalError.fresh()
    _LOG.error("unexpected error in a stream", exc_info=error, extra={"log_id": fixed.log_id})
    return fixed
