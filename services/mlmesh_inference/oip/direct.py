"""ModelInfer and the messages of ModelStreamInfer on the direct lane: no task, no future, and mostly no protobuf.

A request whose header is known becomes a Work by its plan; any other is read in full, by the same code as everywhere,
and leaves a plan behind if it is plain. What needs the generic path (`mlmesh_inference.oip.stream`) is handed back:
streams of sequences and of decoupled models, and streams whose metadata asks for something else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from google.protobuf.message import DecodeError

from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.oip import wire
from mlmesh_inference.oip.infer import DECOUPLED, failure, parse, unplaced, work_of
from mlmesh_inference.oip.plans import Plans, Replies, plan_of
from mlmesh_inference.oip.requests import Regions, Request, read
from mlmesh_inference.oip.stream import ANNOUNCED
from mlmesh_inference.oip.stream_replies import MESSAGES
from mlmesh_inference.running import Work
from mlmesh_inference.tensors import Array
from mlmesh_inference.tracing import request_trace
from mlmesh_runtime.calls import CURRENT, Call
from mlmesh_runtime.direct import DirectCall
from mlmesh_runtime.errors import InvalidInput, MeshError, Unauthenticated, Unsupported
from mlmesh_runtime.identity import XFCC, identity_of, xfcc_uris
from mlmesh_runtime.status import InternalError, code_of
from open_inference import grpc_service_pb2 as pb

_LOG = logging.getLogger(__name__)

TENANTS_MAX: Final = 4096
"""Callers' certificates that are remembered as read."""
GRPC_ERRORS: Final = "triton_grpc_error"
GENERIC_METADATA: Final[tuple[str, ...]] = (ANNOUNCED[0], "x-oip-dialect")
"""Metadata of streams that the generic path answers."""


class Tenants:
    """Who calls, for fairness between callers: the SPIFFE id, "" where it is unknown or ambiguous."""

    def __init__(self) -> None:
        self._source: str | None = None
        self._known: dict[str, str] = {}

    def of(self, call: DirectCall) -> str:
        """Of one call; the certificate header of a sidecar is read once."""
        source = self._source
        if source is None:
            source = self._source = call.context().identity_source
        if source == "xfcc" and not call.streaming:
            header = call.metadata(XFCC)
            if header is None:
                return ""
            known = self._known.get(header)
            return self._read(header) if known is None else known
        return _identity(call.context()) if source in {"xfcc", "tls"} else ""

    def _read(self, header: str) -> str:
        if len(self._known) >= TENANTS_MAX:
            self._known.clear()
        uris = xfcc_uris(header)
        identity = uris[0] if len(uris) == 1 and uris[0].startswith("spiffe://") else ""
        self._known[header] = identity
        return identity


def _identity(call: Call) -> str:
    try:
        return identity_of(call)
    except Unauthenticated:
        return ""


class _Sink:
    """Where the answer to a unary call goes."""

    __slots__ = ("_call", "_name", "_replies")

    def __init__(self, call: DirectCall, replies: Replies, name: bytes) -> None:
        self._call, self._replies, self._name = call, replies, name

    def done(self) -> bool:
        """See running.Sink."""
        return self._call.done()

    def answer(self, arrays: Sequence[Array]) -> None:
        """See running.Sink."""
        try:
            payload = self._replies.encode(self._name, arrays)
        except Exception as error:
            self.fail(error)
        else:
            self._call.reply(*payload)

    def fail(self, error: Exception) -> None:
        """See running.Sink."""
        self._call.fail(_told(error))


class _MessageSink(_Sink):
    """Where the answer to a stream's message goes."""

    __slots__ = ()

    def answer(self, arrays: Sequence[Array]) -> None:
        """See running.Sink."""
        try:
            payload = self._replies.encode(self._name, arrays)
        except Exception as error:
            self.fail(error)
        else:
            MESSAGES.by_code["OK"] += 1
            self._call.reply(*payload)

    def fail(self, error: Exception) -> None:
        """See running.Sink."""
        _refuse_message(self._call, wire.text_of(self._name), self._replies.model_name, error)


class DirectInfer:
    """ModelInfer: a `DirectMethod`.

    Args:
        catalog: the models. regions: registered shared memory, None where it is off.
        plans: False reads every request in full, to compare. always_raw: as of requests.read.
    """

    _final: bool | None = None
    _sink: type[_Sink] = _Sink

    def __init__(
        self, catalog: Catalog, *, regions: Regions | None = None, plans: bool = True, always_raw: bool = False
    ) -> None:
        self._catalog = catalog
        self._always_raw = always_raw
        self._regions = regions
        self._plans = Plans(catalog)
        self._split: Callable[[bytes], wire.Split | None] = wire.split if plans else lambda _message: None
        self._tenant = Tenants().of

    def __call__(self, calls: Iterable[DirectCall]) -> None:
        """See mlmesh_runtime.direct."""
        plans, trace, split, tenant, sink = (
            self._plans.current(),
            request_trace(),
            self._split,
            self._tenant,
            self._sink,
        )
        for call in calls:
            try:
                message = call.request
                cut = split(message)
                plan = None if cut is None else plans.get(cut[0]) or self._plans.find(cut[0])
                if cut is None or plan is None:
                    self._in_full(call, message, cut, trace)
                    continue
                work = plan.work(message, cut[2], call.deadline_ns, tenant(call), trace)
                if work is None:
                    self._in_full(call, message, cut, trace)
                    continue
                self._submit(plan.model, work, sink(call, plan.replies(self._final), cut[1]))
            except Exception as error:
                call.fail(_told(error))

    @staticmethod
    def _submit(model: ReadyModel, work: Work, sink: _Sink) -> None:
        try:
            model.runner.submit(work, sink)
        except Exception as error:
            sink.fail(error)

    def _in_full(self, call: DirectCall, encoded: bytes, cut: wire.Split | None, trace: object | None) -> None:
        """A request by protobuf. Raises what makes it no request at all."""
        try:
            message = parse(encoded)
        except DecodeError:
            text = f"the request of ModelInfer is not a valid message ({len(encoded)} bytes)"
            raise InvalidInput(text, reason="MALFORMED_MESSAGE") from None
        try:
            model = self._catalog.resolve(message.model_name, message.model_version)
            request = self._read(call, message, model)
            if self._is_generic(call, model, request):
                return
        except Exception as error:
            self._refuse(call, message, error)
            return
        plan = plan_of(request, model) if cut is not None else None
        if plan is not None and cut is not None:
            self._plans.add(cut[0], plan)
        replies = Replies(request, model, final=self._final) if plan is None else plan.replies(self._final)
        work = work_of(request, deadline_ns=call.deadline_ns, tenant=self._tenant(call), trace=trace)
        self._submit(model, work, self._sink(call, replies, wire.record_of(message.id)))

    def _read(self, call: DirectCall, message: pb.ModelInferRequest, model: ReadyModel) -> Request:
        if self._regions is None:
            return read(message, model, always_raw=self._always_raw)
        token = CURRENT.set(call.context())
        try:
            return read(message, model, self._regions, always_raw=self._always_raw)
        finally:
            CURRENT.reset(token)

    def _is_generic(self, call: DirectCall, model: ReadyModel, request: Request) -> bool:  # noqa: ARG002
        """Hand a call back by what it asks for; False to go on."""
        if model.runner.decoupled:
            raise Unsupported(DECOUPLED)
        return False

    def _refuse(self, call: DirectCall, message: pb.ModelInferRequest, error: Exception) -> None:  # noqa: ARG002
        call.fail(_told(error))


class DirectStreamInfer(DirectInfer):
    """Messages of ModelStreamInfer: a `DirectMethod`. Arguments as of DirectInfer."""

    _final = True
    _sink = _MessageSink

    def __call__(self, calls: Iterable[DirectCall]) -> None:
        """See mlmesh_runtime.direct."""
        super().__call__(_own(calls))

    def _is_generic(self, call: DirectCall, model: ReadyModel, request: Request) -> bool:
        if model.runner.decoupled or request.options.sequence is not None:
            call.generic()
            return True
        return False

    def _refuse(self, call: DirectCall, message: pb.ModelInferRequest, error: Exception) -> None:
        _refuse_message(call, message.id, message.model_name, error)


def _own(calls: Iterable[DirectCall]) -> Iterator[DirectCall]:
    """Messages that are not the generic path's; looked at one by one, since a message may hand its stream back."""
    for call in calls:
        if call.done():
            continue
        if any(call.metadata(name) is not None for name in GENERIC_METADATA):
            call.generic()
        else:
            yield call


def _refuse_message(call: DirectCall, request_id: str, model_name: str, error: Exception) -> None:
    """Say in its place on the stream that a message failed; or end the stream so, if its metadata asks for that."""
    told = _told(error)
    MESSAGES.by_code[code_of(told).name] += 1
    if (call.metadata(GRPC_ERRORS) or "").lower() == "true":
        call.fail(told)
    else:
        call.reply(failure(request_id, model_name, told).SerializeToString())


def _told(error: Exception) -> MeshError:
    if isinstance(error, MeshError):
        return unplaced(error)
    fixed = InternalError.fresh()
    _LOG.error("unexpected error in a request", exc_info=error, extra={"log_id": fixed.log_id})
    return fixed
