"""What is known of a request from its header alone: one client's requests repeat it, so it is checked once.

A `Plan` is made from a request that passed `requests.read`, the one place where requests are judged, and stands for
every request with the same header (`wire.split`): the same model, tensors, shapes, outputs and parameters. What is left
to do for such a request is to compare the sizes of its raw contents. `Replies` are the same on the way out: what an
answer of certain shapes looks like is taken from one that `replies.write` wrote, and only ids and data differ.

Whatever is not plain has no plan: typed contents other than FP32 and FP64, shared memory, sequences, decoupled models.
A request that does not fit its plan is read in full, which also tells what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.oip import replies, wire
from mlmesh_inference.oip.requests import Request
from mlmesh_inference.running import Work, shape_key
from mlmesh_inference.tensors import Array, Datatype, decode_raw, encode_raw
from mlmesh_runtime.direct import Payload
from mlmesh_runtime.errors import InvalidInput
from open_inference import grpc_service_pb2 as pb

PLANS_MAX: Final = 1024
"""Headers that are remembered."""
TEMPLATES_MAX: Final = 64
"""Shapes of answers that are remembered of one plan."""
COPIED_BYTES_MAX: Final = 1 << 14
"""An output up to this size is copied on the way out, which costs less than a view of it."""


@dataclass(frozen=True, slots=True)
class _Feed:
    """One input, in the order of the raw contents. `size` in bytes, -1 where the contents say it (BYTES)."""

    name: str
    kind: Datatype
    shape: tuple[int, ...]
    size: int


class Replies:
    """Writes answers to requests of one header.

    Args:
        final: None for unary answers, else answers on a stream: whether they are the last to their request.
        repeats: whether there will be more answers than one.
    """

    __slots__ = ("_final", "_head", "_kinds", "_model", "_plain", "_request", "_templates", "_typed")

    def __init__(
        self, request: Request, model: ReadyModel, *, final: bool | None = None, repeats: bool = False
    ) -> None:
        self._request, self._model, self._final = request, model, final
        self._kinds = tuple([model.outputs[name].datatype for name in request.outputs])
        plain = repeats and not (request.classes or request.placed) and all(kind.itemsize for kind in self._kinds)
        # What is answered to a typed request in typed contents has a template only if these lie there as in memory.
        self._typed = request.typed and all(kind.contents for kind in self._kinds)
        self._plain = plain and (not self._typed or all(kind.contents in wire.PACKED for kind in self._kinds))
        self._templates: dict[object, _Template] = {}
        self._head = b""

    @property
    def model_name(self) -> str:
        """Name of the model that answers."""
        return self._model.name

    def encode(self, name: bytes, arrays: Sequence[Array]) -> tuple[Payload, ...]:
        """An encoded ModelInferResponse, on a stream ModelStreamInferResponse, in pieces.

        Args:
            name: the record of the request's `id`, as `wire.split` gives it.
            arrays: one an output.
        """
        key = arrays[0].shape if len(arrays) == 1 else tuple([array.shape for array in arrays])
        template = self._templates.get(key)
        if template is None:
            return self._written(key, name, arrays)
        if self._final is None:
            pieces: list[Payload] = [self._head, name] if name else [self._head]
        else:
            head = template.heads.get(len(name))
            if head is None:
                head = template.heads[len(name)] = self._outer(len(name) + template.size)
            pieces = [head, name] if name else [head]
        for prefix, kind, array in zip(template.prefixes, self._kinds, arrays):  # noqa: B905  checked for the template
            pieces.append(prefix)
            if array.dtype is not kind.dtype:
                array = array.astype(kind.dtype, copy=False)  # noqa: PLW2901
            if array.nbytes <= COPIED_BYTES_MAX or not array.flags.c_contiguous:
                pieces.append(array.tobytes())
            else:
                pieces.append(array.data.cast("B"))
        return tuple(pieces)

    def _outer(self, size: int) -> bytes:
        """What is before a stream's answer: the field of the wrapping message, and the head."""
        return b"".join((b"\x12", wire.varint(len(self._head) + size), self._head))

    def _written(self, key: object, name: bytes, arrays: Sequence[Array]) -> tuple[Payload, ...]:
        """The answer by protobuf; and remember its looks, if it is plain."""
        request = self._request
        response = replies.write(wire.text_of(name), request, self._model, arrays, final=self._final)
        encoded = response.SerializeToString()
        if self._plain and len(self._templates) < TEMPLATES_MAX:
            template = self._template(response, encoded, name, arrays)
            if template is not None:
                self._templates[key] = template
        if self._final is None:
            return (encoded,)
        return b"".join((b"\x12", wire.varint(len(encoded)))), encoded

    def _template(
        self, response: pb.ModelInferResponse, encoded: bytes, name: bytes, arrays: Sequence[Array]
    ) -> _Template | None:
        """Take an answer apart; None when it does not look as expected."""
        head = pb.ModelInferResponse(model_name=self._model.name, model_version=self._model.version_text)
        self._head = head.SerializeToString()
        begin = self._head + name
        data = [encode_raw(kind, array) for kind, array in zip(self._kinds, arrays, strict=True)]
        prefixes = _typed_prefixes(response, data) if self._typed else [_tagged(b"\x32", raw) for raw in data]
        end = b"".join([piece for pair in zip(prefixes, data, strict=True) for piece in pair])
        if not (data and encoded.startswith(begin) and encoded.endswith(end) and len(encoded) >= len(begin) + len(end)):
            return None
        prefixes[0] = encoded[len(begin) : len(encoded) - len(end)] + prefixes[0]
        return _Template(prefixes=tuple(prefixes), size=len(encoded) - len(begin), heads={})


def _tagged(tag: bytes, payload: bytes) -> bytes:
    """What is before a payload on the wire."""
    return tag + wire.varint(len(payload))


def _typed_prefixes(response: pb.ModelInferResponse, data: Sequence[bytes]) -> list[bytes]:
    """What is before the elements of each output, which are at its very end."""
    outputs = [output.SerializeToString() for output in response.outputs]
    return [
        _tagged(b"\x2a", output) + output[: len(output) - len(raw)] for output, raw in zip(outputs, data, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Template:
    """An answer of certain shapes: what is before each output's data, and the size of all but head and id.

    `heads` are what is before a stream's answer, by the size of the id's record.
    """

    prefixes: tuple[bytes, ...]
    size: int
    heads: dict[int, bytes]


class Plan:
    """A header that is in order.

    Attributes:
        model: that answers.
    """

    __slots__ = ("_feeds", "_key", "_message", "_options", "_outputs", "_rows", "_spans", "_unary", "model")

    def __init__(self, request: Request, model: ReadyModel) -> None:
        self.model = model
        bare = replace(request, inputs={})  # the arrays are this request's own
        self._unary = Replies(bare, model, repeats=True)
        self._message = Replies(bare, model, final=True, repeats=True)
        self._feeds = tuple(
            _Feed(
                name=name,
                kind=(kind := model.inputs[name].datatype),
                shape=array.shape,
                size=array.nbytes if kind.itemsize else -1,
            )
            for name, array in request.inputs.items()
        )
        self._spans = 2 * len(self._feeds)
        self._outputs, self._rows, self._options = request.outputs, request.rows, request.options
        self._key = shape_key(request.inputs, request.outputs)

    def replies(self, final: bool | None) -> Replies:
        """What writes answers: unary ones (None), or a stream's last ones (True)."""
        return self._unary if final is None else self._message

    def work(
        self, message: bytes, spans: Sequence[int], deadline_ns: int, tenant: str, trace: object | None
    ) -> Work | None:
        """The work of a request with this header whose raw contents are at `spans`; None when they do not fit.

        Its inputs are views of the message, wherever they begin there, so not always aligned.
        """
        if len(spans) != self._spans:
            return None
        inputs: dict[str, Array] = {}
        at = 0
        for feed in self._feeds:
            start, end = spans[at], spans[at + 1]
            at += 2
            size = feed.size
            if end - start == size > 0:
                inputs[feed.name] = np.ndarray(feed.shape, feed.kind.dtype, message, start)
            elif (array := self._unusual(feed, message, start, end)) is not None:
                inputs[feed.name] = array
            else:
                return None
        options = self._options
        return Work(
            inputs=inputs,
            outputs=self._outputs,
            rows=self._rows,
            deadline_ns=deadline_ns,
            timeout_us=options.timeout_us,
            priority=options.priority,
            tenant=tenant,
            parameters=options.own,
            trace=trace,
            shape_key=self._key,
        )

    def _unusual(self, feed: _Feed, message: bytes, start: int, end: int) -> Array | None:
        """An input of BYTES, or without elements."""
        if feed.size > 0:
            return None
        try:
            return decode_raw(feed.kind, feed.shape, message[start:end], tensor=feed.name, model=self.model.name)
        except InvalidInput:
            return None


def plan_of(request: Request, model: ReadyModel) -> Plan | None:
    """A plan for requests with the header of one that is in order and could be split; None when it is not plain."""
    if request.placed or request.options.sequence is not None or model.runner.decoupled:
        return None
    return Plan(request, model)


class Plans:
    """Plans by header, for as long as the catalog does not change.

    Two generations of half the room each: what is used goes into the younger one, and when that is full the older one
    goes. So plans that are used stay, however many headers come by that never repeat.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._generation = -1
        self._young: dict[bytes, Plan] = {}
        self._old: dict[bytes, Plan] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def current(self) -> dict[bytes, Plan]:
        """Plans that hold until the event loop's next turn; `find` knows more."""
        if self._generation != self._catalog.generation:
            self._generation = self._catalog.generation
            self._young, self._old = {}, {}
        return self._young

    def find(self, header: bytes) -> Plan | None:
        """A plan that `current` does not hold (any more)."""
        plan = self._young.get(header)
        if plan is None and (plan := self._old.pop(header, None)) is not None:
            self.add(header, plan)
        return plan

    def add(self, header: bytes, plan: Plan) -> None:
        """Remember a plan."""
        if len(self.current()) >= PLANS_MAX // 2:
            self._old, self._young = self._young, {}
        self._young[header] = plan
