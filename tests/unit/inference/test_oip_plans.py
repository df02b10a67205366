"""The fast path and the full one take, refuse and answer alike, byte for byte, whatever bytes come."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlmesh_inference.catalog import Catalog
from mlmesh_inference.oip import direct, plans, wire
from mlmesh_inference.oip.direct import MESSAGES, DirectInfer, DirectStreamInfer
from mlmesh_inference.running import shape_key
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec, encode_raw
from mlmesh_runtime.errors import MeshError, Overloaded
from open_inference import grpc_service_pb2 as pb
from tests.support.direct_calls import Immediate, Outcome, catalog_of, immediate_model
from tests.support.inference import GatedEngine, ready_model


def spec(name: str, kind: str, *, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=DATATYPES[kind], shape=(-1, -1), optional=optional)


SIGNATURE = Signature(
    inputs=(spec("x", "FP32"), spec("i", "INT8", optional=True), spec("t", "BYTES", optional=True)),
    outputs=(spec("y", "FP32"), spec("h", "FP16"), spec("s", "BYTES")),
)


class Pair:
    """The two paths over one catalog. The fast one keeps its plans from example to example."""

    def __init__(self, signature: Signature = SIGNATURE, *, decoupled: bool = False) -> None:
        model, self.runner = immediate_model(signature, decoupled=decoupled)
        self.catalog: Catalog = catalog_of(model)
        self.fast = {False: DirectInfer(self.catalog), True: DirectStreamInfer(self.catalog)}
        self.full = {False: DirectInfer(self.catalog, plans=False), True: DirectStreamInfer(self.catalog, plans=False)}

    def alike(self, encoded: bytes, *, streaming: bool = False, fast_only: bool = False) -> Outcome:
        """Ask both, the fast one twice; nothing may differ, neither the answer nor the work."""
        outcomes, works = [], []
        for method in (self.full[streaming], self.fast[streaming], self.fast[streaming]):
            self.runner.works.clear()
            outcome = Outcome(encoded, streaming=streaming, deadline_ns=123)
            method([outcome])
            assert outcome.ended
            outcomes.append(outcome)
            works.append([seen(work) for work in self.runner.works])
        assert outcomes[0].seen() == outcomes[1].seen() == outcomes[2].seen()
        assert works[0] == works[1] == works[2]
        return outcomes[0]


def seen(work: object) -> tuple[object, ...]:
    inputs = {}
    for name, array in work.inputs.items():  # type: ignore[attr-defined]
        data = array.ravel().tolist() if array.dtype == object else array.tobytes()
        inputs[name] = (array.dtype, array.shape, data)
    key = shape_key(work.inputs, work.outputs)  # type: ignore[attr-defined]
    assert work.shape_key in (None, key)  # type: ignore[attr-defined]
    fields = ("outputs", "rows", "deadline_ns", "timeout_us", "priority", "tenant", "sequence", "trace")
    return list(inputs.items()), *(getattr(work, name) for name in fields), dict(work.parameters)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def message(rows: int = 2, name: str = "7", width: int = 2, **fields: object) -> pb.ModelInferRequest:
    data = np.arange(rows * width, dtype=np.float32).tobytes()
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[rows, width])
    return pb.ModelInferRequest(
        model_name="m",
        id=name,
        inputs=[tensor],
        raw_input_contents=[data],
        **fields,  # type: ignore[arg-type]
    )


def many() -> pb.ModelInferRequest:
    """Three inputs, an output twice as long as the others, parameters."""
    made = message()
    made.inputs.add(name="t", datatype="BYTES", shape=[2, 1])
    made.raw_input_contents.append(encode_raw(DATATYPES["BYTES"], np.array([[b"ab"], [b""]], object)))
    made.inputs.add(name="i", datatype="INT8", shape=[2, 3])
    made.raw_input_contents.append(bytes(range(6)))
    made.outputs.add(name="h")
    made.outputs.add(name="y")
    made.parameters["priority"].uint64_param = 3
    made.parameters["timeout"].int64_param = 1_000_000
    made.parameters["mine"].string_param = "ü"
    return made


def typed() -> pb.ModelInferRequest:
    made = message()
    del made.raw_input_contents[:]
    made.inputs[0].contents.fp32_contents.extend([1.0, float("nan"), 3.0, -0.0])
    made.outputs.add(name="y")
    return made


def typed_numbers() -> pb.ModelInferRequest:
    made = typed()
    made.inputs.add(name="i", datatype="INT8", shape=[2, 1]).contents.int_contents.extend([1, -1])
    return made


def sequence() -> pb.ModelInferRequest:
    made = message()
    made.parameters["sequence_id"].int64_param = 5
    made.parameters["sequence_start"].bool_param = True
    return made


def classified() -> pb.ModelInferRequest:
    made = message()
    made.outputs.add(name="y").parameters["classification"].int64_param = 2
    return made


KINDS: dict[str, Callable[[], pb.ModelInferRequest]] = {
    "plain": message,
    "many": many,
    "typed": typed,
    "typed numbers": typed_numbers,
    "typed, all outputs": lambda: pb.ModelInferRequest(model_name="m", id="7", inputs=typed().inputs),
    "sequence": sequence,
    "classified": classified,
    "no rows": lambda: message(0),
    "no id": lambda: message(name=""),
    "a long id": lambda: message(name="n" * 300),
    "an id of two bytes a character": lambda: message(name="ü" * 60),
    "not typed and nothing": lambda: pb.ModelInferRequest(model_name="m"),
    "an unknown model": lambda: message(model_version="9"),
    "bytes out": lambda: message(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="s")]),
    "half out": lambda: message(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="h")]),
}
SEEDS = {name: bytes(make().SerializeToString(deterministic=True)) for name, make in KINDS.items()}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_request(kind: str, streaming: bool, pair: Pair) -> None:
    outcome = pair.alike(SEEDS[kind], streaming=streaming)
    if outcome.answers and not outcome.generically:
        reply = (pb.ModelStreamInferResponse if streaming else pb.ModelInferResponse).FromString(outcome.answers[0])
        assert (reply.infer_response if streaming else reply).id == KINDS[kind]().id  # type: ignore[attr-defined]


def test_what_is_plain_has_a_plan_and_what_is_not_has_none() -> None:
    for kind, expected in {
        "plain": True,
        "many": True,
        "typed": True,
        "typed numbers": False,
        "sequence": False,
        "no id": True,
    }.items():
        pair = Pair()
        pair.alike(SEEDS[kind])
        assert len(pair.fast[False]._plans) == expected, kind


def test_a_plan_answers_without_protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.alike(SEEDS["half out"])
    monkeypatch.setattr(plans.replies, "write", None)
    monkeypatch.setattr(DirectInfer, "_in_full", None)
    outcome = Outcome(bytes(message(name="other", outputs=KINDS["half out"]().outputs).SerializeToString()))
    pair.fast[False]([outcome])
    assert pb.ModelInferResponse.FromString(outcome.answers[0]).id == "other"


@given(data=st.data(), streaming=st.booleans())
def test_shapes_ids_and_lengths(data: st.DataObject, streaming: bool, pair: Pair) -> None:
    rows, width = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    made = message(rows, data.draw(st.text(max_size=140)), width)
    short = data.draw(st.integers(-4, 4))
    raw = made.raw_input_contents[0]
    made.raw_input_contents[0] = raw[:short] if short < 0 else raw + bytes(short)
    if data.draw(st.booleans()):
        made.inputs.add(name="t", datatype="BYTES", shape=[rows, 1])
        made.raw_input_contents.append(data.draw(st.binary(max_size=12)))
    pair.alike(bytes(made.SerializeToString()), streaming=streaming)


_LONGEST = max(map(len, SEEDS.values()))


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, _LONGEST), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.none() | st.integers(0, _LONGEST),
    streaming=st.booleans(),
)
def test_mutated_bytes(
    kind: str, changes: Sequence[tuple[int, int]], cut: int | None, streaming: bool, pair: Pair
) -> None:
    raw = bytearray(SEEDS[kind])
    for place, value in changes:
        raw[place % len(raw)] = value
    pair.alike(bytes(raw[:cut]), streaming=streaming)


def _record(tag: int, payload: bytes, padding: int = 0) -> bytes:
    """A field with its length; padding makes the length longer than it need be, which protobuf allows."""
    length = wire.varint(len(payload))
    if padding:
        length = length[:-1] + bytes((length[-1] | 0x80,)) + b"\x80" * (padding - 1) + b"\x00"
    return wire.varint(tag) + length + payload


def _tensor(**fields: object) -> bytes:
    return bytes(pb.ModelInferRequest.InferInputTensor(**fields).SerializeToString())  # type: ignore[arg-type]


_X = _tensor(name="x", datatype="FP32", shape=[1, 2])
_PIECES: dict[int, list[bytes]] = {
    0x0A: [b"m", b"m", b"nope", b"\xff"],
    0x12: [b"", b"1", b"9", b"@stable"],
    0x1A: [b"a", b"b", b"", b"\xff\xfe", "ü".encode(), b"\xed\xa0\x80", b"i" * 130],
    0x22: [
        b"\x0a\x04mine\x12\x02\x08\x01",
        b"\x0a\x04mine\x12\x02\x10\x05\x12\x02\x18\x01",
        b"\x0a\x07timeout\x12\x02\x10\x05",
        b"\x0a\x08priority\x12\x02\x28\x05",
        b"",
    ],
    0x2A: [
        _X,
        _X,
        _X,
        # Unpacked and in two parts, the name said twice, an unknown field, contents merged of two parts.
        b"\x18\x01\x18\x02" + _tensor(name="x", datatype="FP32"),
        b"\x0a\x01q" + _X,
        _X + b"\x98\x06\x01",
        _X + b"\x2a\x06\x32\x04\x00\x00\x80\x3f\x2a\x06\x32\x04\x00\x00\x00\x40",
        _X + b"\x2a\x0a\x32\x08\x00\x00\x80\x3f\x00\x00\x00\x40",
        _X + b"\x2a\x0c\x32\x04\x00\x00\x80\x3f\x32\x04\x00\x00\x00\x40",
        _X + b"\x2a\x0a\x3a\x08\x00\x00\x80\x3f\x00\x00\x00\x40",
        _tensor(name="x", datatype="FP32", shape=[1, 0]) + b"\x2a\x02\x32\x00",
        _tensor(name="i", datatype="INT8", shape=[1, 2]),
        _tensor(name="t", datatype="BYTES", shape=[1, 1]),
    ],
    0x32: [b"\x0a\x01y", b"\x0a\x01h", b"\x0a\x01h\x0a\x01y", b"\x0a\x01s", b""],
    0x3A: [bytes(8), bytes(8), bytes(8), bytes(7), b"ab", b"\x01\x00\x00\x00z", b""],
}
_ODD = [
    b"\x40\x05",
    b"\x3d\x00\x00\x00\x00",
    b"\x0b\x0c",
    b"\x42\x01z",
    b"\x1d\x00\x00\x00\x00",
    b"\x00",
    b"\x3a",
    b"\x80",
]
_RECORD = st.sampled_from(sorted(_PIECES)).flatmap(
    lambda tag: st.builds(
        _record, st.just(tag), st.sampled_from(_PIECES[tag]), st.sampled_from([0, 0, 0, 0, 0, 0, 1, 3, 4])
    )
)
_RECORDS = st.lists(_RECORD, min_size=2, max_size=8)


@settings(max_examples=150)
@example(records=[_record(0x0A, b"m"), _record(0x2A, _X), _record(0x3A, bytes(8))], odd=b"", streaming=False)
@example(records=[_record(0x3A, bytes(8)), _record(0x2A, _X), _record(0x0A, b"m")], odd=b"", streaming=True)
@example(
    records=[_record(0x1A, b"a"), _record(0x0A, b"m"), _record(0x2A, _X), _record(0x1A, b"b"), _record(0x3A, bytes(8))],
    odd=b"",
    streaming=False,
)
@given(records=_RECORDS, odd=st.just(b"") | st.sampled_from(_ODD), streaming=st.booleans())
def test_records_in_any_order_and_number(records: Sequence[bytes], odd: bytes, streaming: bool, pair: Pair) -> None:
    pair.alike(b"".join((*records, odd)), streaming=streaming)


@given(
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2),
    kind=st.sampled_from(sorted(SEEDS)),
)
def test_a_split_holds_all_of_the_message(changes: Sequence[tuple[int, int]], kind: str) -> None:
    raw = bytearray(SEEDS[kind])
    for place, value in changes:
        raw[place % len(raw)] = value
    encoded = bytes(raw)
    cut = wire.split_python(encoded)
    assert wire.split(encoded) == cut
    if cut is None:
        return
    header, name, spans = cut
    if header.startswith(b"\0"):
        assert len(header) - 1 + len(name) + sum(spans[1::2]) - sum(spans[::2]) in (len(encoded), len(encoded) - 2)
        return
    pieces = [encoded[spans[at] : spans[at + 1]] for at in range(0, len(spans), 2)]
    again = b"".join((header, name, *(_record(0x3A, piece) for piece in pieces)))
    try:
        parsed = pb.ModelInferRequest.FromString(encoded)
    except Exception:
        with pytest.raises(Exception, match="parsing"):
            pb.ModelInferRequest.FromString(again)
    else:
        assert pb.ModelInferRequest.FromString(again) == parsed
        assert list(parsed.raw_input_contents) == pieces
        assert parsed.id == wire.text_of(name)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\x3a",
        b"\x3a\x05abc",
        SEEDS["not typed and nothing"],
        SEEDS["typed numbers"],
        SEEDS["a long id"],
        _record(0x1A, b"a") * 2 + _record(0x3A, b""),
        _record(0x3A, b"") * (wire.CONTENTS_MAX + 1),
        _record(0x0A, b"m" * wire.HEADER_BYTES_MAX) + _record(0x3A, b""),
        b"\x3a\x80\x80\x80\x80\x00",
        _record(0x3A, b"") + b"\x40\x01",
    ],
)
def test_what_is_not_plain_is_not_split(encoded: bytes) -> None:
    assert wire.split_python(encoded) is None
    assert wire.split(encoded) is None


def test_plans_end_with_the_version_they_are_of() -> None:
    pair = Pair()
    pair.alike(SEEDS["plain"])
    model, runner = immediate_model(SIGNATURE)
    pair.catalog.install(model, engine="", engine_reason="")
    outcome = Outcome(SEEDS["plain"])
    pair.fast[False]([outcome])
    assert outcome.answers
    assert len(runner.works) == 1
    pair.catalog.withdraw("m", 1)
    gone = Outcome(SEEDS["plain"])
    pair.fast[False]([gone])
    assert gone.error is not None


def test_plans_are_bounded_and_those_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PLANS_MAX", 8)
    pair = Pair()
    pair.alike(SEEDS["half out"])
    made: list[object] = []
    monkeypatch.setattr(direct, "plan_of", lambda *of: made.append(of) or plans.plan_of(*of))
    for width in range(40):
        pair.fast[False]([Outcome(bytes(message(1, "", width).SerializeToString()))])
        pair.fast[False]([Outcome(SEEDS["half out"])])
        assert len(pair.fast[False]._plans) <= 8
    assert len(made) == 40


def test_what_the_runner_refuses_or_fails_is_told_alike(pair: Pair) -> None:
    for error in (Overloaded("full", reason="QUEUE_FULL"), ValueError("a bug")):
        for place in ("refusal", "failure"):
            own = Pair()
            own.alike(SEEDS["plain"])
            setattr(own.runner, place, error)
            for streaming in (False, True):
                fast, full = Outcome(SEEDS["plain"], streaming=streaming), Outcome(SEEDS["plain"], streaming=streaming)
                own.fast[streaming]([fast])
                own.full[streaming]([full])
                assert fast.ended
                if isinstance(error, MeshError):
                    assert fast.seen() == full.seen()
                if streaming:
                    reply = pb.ModelStreamInferResponse.FromString(fast.answers[0])
                    assert reply.infer_response.id == "7"
                    assert "a bug" not in reply.error_message
                else:
                    assert fast.error is not None
                    assert "a bug" not in fast.error.message


def test_an_output_that_cannot_be_written_fails_alone() -> None:
    pair = Pair(Signature(inputs=SIGNATURE.inputs, outputs=(spec("s", "BYTES"),)))
    good = [Outcome(SEEDS["plain"]) for _ in range(2)]
    pair.fast[False]([good[0]])
    text = Immediate._output
    pair.runner._output = lambda *_: np.array([[1, 2]], object)  # type: ignore[method-assign]
    bad = Outcome(SEEDS["plain"])
    pair.fast[False]([bad])
    pair.runner._output = text.__get__(pair.runner)  # type: ignore[method-assign]
    pair.fast[False]([good[1]])
    assert bad.error is not None
    assert bad.error.reason == "INTERNAL"
    assert good[0].answers == good[1].answers


def test_generic_streams_are_handed_back(pair: Pair) -> None:
    assert pair.alike(SEEDS["sequence"], streaming=True).generically
    assert Pair(decoupled=True).alike(SEEDS["plain"], streaming=True).generically
    for metadata in ({"mlmesh-stream": "resumable"}, {"x-oip-dialect": "mlserver"}):
        outcome = Outcome(SEEDS["plain"], streaming=True, metadata=metadata)
        pair.fast[True]([outcome])
        assert outcome.generically


def test_a_decoupled_model_has_no_unary_answer() -> None:
    error = Pair(decoupled=True).alike(SEEDS["plain"]).error
    assert error is not None
    assert error.message == "ModelInfer RPC doesn't support models with decoupled transaction policy"


def test_a_stream_can_be_told_to_fail_as_grpc_does(pair: Pair) -> None:
    outcome = Outcome(SEEDS["an unknown model"], streaming=True, metadata={"triton_grpc_error": "True"})
    pair.fast[True]([outcome])
    assert outcome.error is not None


def test_messages_are_counted_by_how_they_were_answered(pair: Pair) -> None:
    before = dict(MESSAGES.by_code)
    pair.fast[True]([Outcome(SEEDS["plain"], streaming=True) for _ in range(3)])
    pair.fast[True]([Outcome(SEEDS["an unknown model"], streaming=True)])
    after = MESSAGES.by_code
    assert (after["OK"] - before.get("OK", 0), after["NOT_FOUND"] - before.get("NOT_FOUND", 0)) == (3, 1)
    assert {sample.labels["code"] for sample in MESSAGES.collect()[0].samples} >= {"OK", "NOT_FOUND"}


@pytest.mark.parametrize(
    ("header", "tenant"),
    [
        (None, ""),
        ("By=x;URI=spiffe://a/ns/b/sa/c", "spiffe://a/ns/b/sa/c"),
        ("URI=spiffe://liar,By=x;URI=spiffe://a/ns/b/sa/c", "spiffe://a/ns/b/sa/c"),
        ("URI=spiffe://a;URI=spiffe://b", ""),
        ("URI=https://a", ""),
    ],
)
def test_who_calls_is_told_to_the_scheduler(header: str | None, tenant: str, pair: Pair) -> None:
    metadata = {} if header is None else {"x-forwarded-client-cert": header}
    for streaming in (False, True):
        method = (DirectStreamInfer if streaming else DirectInfer)(pair.catalog)
        for _ in range(2):
            pair.runner.works.clear()
            method([Outcome(SEEDS["plain"], streaming=streaming, metadata=metadata, identity_source="xfcc")])
            assert pair.runner.works[0].tenant == tenant


class Identity(GatedEngine):
    """y is x, the very array; it remembers what it got."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Give it back."""
        self.got = inputs["x"]
        return [self.got for _ in outputs]


async def test_sixteen_mebibytes_are_copied_once_at_most() -> None:
    """Between the bytes that a transport gives and those that it gets, through the real batcher.

    An input that begins where a float may is not copied at all; another is, for the engine. An output goes out as a
    view of the engine's array.
    """
    width = 4 << 20
    engine = Identity(width=width, is_open=True)
    catalog = catalog_of(ready_model(engine))
    method = DirectInfer(catalog)
    for name in ("", "1", "22", "333"):
        encoded = bytes(message(1, name, width).SerializeToString())
        peaks, taken = [], []
        for _ in range(3):
            outcome = Outcome(encoded)
            answered = asyncio.get_running_loop().create_future()
            outcome.reply = lambda *payload, to=answered: to.set_result(payload)  # type: ignore[method-assign,misc]
            tracemalloc.start()
            method([outcome])
            taken = await answered
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        start = encoded.index(b"\x3a\x80\x80\x80\x08") + 5
        assert peaks[-1] < 100_000 + (4 * width if start % 4 else 0), start
        assert engine.got.flags.aligned
        view = next(piece for piece in taken if isinstance(piece, memoryview))
        assert np.shares_memory(np.frombuffer(view, np.uint8), engine.got)
        assert b"".join(taken).endswith(encoded[start:])
    catalog.resolve("m", "").runner.abort()
