"""A stream's bookkeeping over connections that the test opens, breaks and moves."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from mlmesh_client.errors import InferenceError, SequenceLost
from mlmesh_client.messages import FINAL, RESUME, Result, SequencePlace
from mlmesh_client.session import Session
from open_inference import grpc_service_pb2 as pb


def ask(session: Session, *names: str, sequence: SequencePlace | None = None) -> list[Result]:
    """Add requests; each carries its name as its version, so that answers can be told apart."""
    found = []
    for name in names:
        request = pb.ModelInferRequest(model_name="m", model_version=name)
        found += session.add(request, name=name, sequence=sequence)
    return found


def sent(session: Session) -> list[pb.ModelInferRequest]:
    """What goes out on the present connection now."""
    found = []
    while (request := session.next()) is not None:
        found.append(request)
    return found


def names(messages: Sequence[pb.ModelInferRequest]) -> list[str]:
    return [message.model_version for message in messages]


def answer(request: pb.ModelInferRequest, *, final: bool | None = None, error: str = "") -> pb.ModelStreamInferResponse:
    reply = pb.ModelStreamInferResponse(error_message=error)
    reply.infer_response.id = request.id
    reply.infer_response.model_version = request.model_version
    if final is not None:
        reply.infer_response.parameters[FINAL].bool_param = final
    return reply


def move(token: str = "t") -> pb.ModelStreamInferResponse:  # noqa: S107
    reply = pb.ModelStreamInferResponse()
    reply.infer_response.parameters[RESUME].string_param = token
    return reply


def given_out(results: Sequence[Result]) -> list[str]:
    return [result.id for result in results]


def connected(*asked: str, ordered: bool = True) -> Session:
    session = Session(ordered=ordered)
    session.opened()
    ask(session, *asked)
    return session


def test_results_come_in_the_order_of_requests_whatever_the_order_of_answers() -> None:
    session = connected("a", "b", "c")
    a, b, c = sent(session)
    assert len({a.id, b.id, c.id}) == 3
    assert session.received(answer(b)) == []
    assert session.received(answer(c)) == []
    assert given_out(session.received(answer(a))) == ["a", "b", "c"]
    assert len(session) == 0


def test_an_answer_is_given_out_once() -> None:
    session = connected("a", "b")
    a, _ = sent(session)
    assert given_out(session.received(answer(a))) == ["a"]
    assert session.received(answer(a)) == []
    strange = pb.ModelInferRequest(id="nobody")
    assert session.received(answer(strange)) == []
    assert session.duplicates == 2


def test_what_has_no_answer_is_sent_again_and_nothing_else() -> None:
    session = connected("a", "b", "c", "d")
    first = sent(session)
    session.received(answer(first[0]))
    session.received(answer(first[2]))  # out of order: kept, not given out yet
    assert session.broke() == []
    session.opened()
    again = sent(session)
    assert names(again) == ["b", "d"]
    assert session.resent == 2
    assert given_out(session.received(answer(again[0]))) == ["b", "c"]


def test_a_server_that_asks_to_move_gets_no_more_and_its_token_goes_with_the_first_request() -> None:
    session = connected("a", "b")
    a = session.next()
    assert a is not None
    assert session.received(move("token")) == []
    assert session.leaving
    assert session.next() is None
    assert session.broke() == []
    session.opened()
    again = sent(session)
    assert names(again) == ["a", "b"]
    assert [request.parameters[RESUME].string_param for request in again if RESUME in request.parameters] == ["token"]
    assert RESUME not in a.parameters
    assert given_out(session.received(answer(a))) == ["a"]
    # From then on the token is of the past.
    session.broke()
    session.opened()
    assert all(RESUME not in request.parameters for request in sent(session))


def test_a_token_whose_server_never_answered_goes_to_the_next() -> None:
    session = connected("a")
    sent(session)
    session.received(move("token"))
    for _ in range(3):
        session.broke()
        session.opened()
        (again,) = sent(session)
        assert again.parameters[RESUME].string_param == "token"


def test_errors_are_results() -> None:
    session = connected("a", "b")
    a, b = sent(session)
    refused = answer(a, error="no")
    refused.infer_response.parameters["mlmesh_code"].string_param = "RESOURCE_EXHAUSTED"
    refused.infer_response.parameters["mlmesh_retry_after_ms"].int64_param = 250
    (result,) = session.received(refused)
    assert result.error is not None
    assert (result.error.code, result.error.retry_after_s) == ("RESOURCE_EXHAUSTED", 0.25)
    # Some servers leave the id out: it is the oldest.
    without = answer(pb.ModelInferRequest(), error="unknown model")
    (result,) = session.received(without)
    assert (result.id, str(result.error)) == ("b", "unknown model")
    assert b is not None


def test_a_request_that_was_refused_with_a_hint_is_sent_again_then_and_in_its_place() -> None:
    now_s = 100.0
    session = Session(retry=lambda error, tries: error.retry_after_s if tries < 3 else None, clock=lambda: now_s)
    session.opened()
    ask(session, "a", "b")
    a, b = sent(session)
    refused = answer(a, error="full")
    refused.infer_response.parameters["mlmesh_retry_after_ms"].int64_param = 2000
    assert session.due_s() is None
    assert session.received(refused) == []
    assert session.received(answer(b)) == []
    assert (session.next(), session.due_s()) == (None, 2.0)
    now_s = 102.0
    assert sent(session) == [a]
    assert session.received(refused) == []
    # Another connection does not wait.
    session.broke()
    session.opened()
    assert names(sent(session)) == ["a"]
    results = session.received(refused)
    assert given_out(results) == ["a", "b"]
    assert results[0].error is not None


def test_a_request_of_a_sequence_is_not_sent_again() -> None:
    session = Session(retry=lambda _error, _tries: 0.0)
    session.opened()
    ask(session, "s", sequence=SequencePlace(id=1, start=True))
    (result,) = session.received(answer(sent(session)[0], error="full"))
    assert result.error is not None


def test_answers_of_a_decoupled_model_come_as_they_come_and_once() -> None:
    session = connected("a", "b", ordered=False)
    a, b = sent(session)
    assert given_out(session.received(answer(a, final=False))) == ["a"]
    assert given_out(session.received(answer(b, final=False))) == ["b"]
    assert given_out(session.received(answer(b, final=True))) == ["b"]
    session.broke()
    session.opened()
    (again,) = sent(session)
    # The first answer to "a" was given out before the connection broke.
    assert session.received(answer(again, final=False)) == []
    assert given_out(session.received(answer(again, final=True))) == ["a"]
    assert len(session) == 0


def test_a_sequence_that_lived_on_a_lost_server_is_lost_until_it_begins_again() -> None:
    session = Session()
    session.opened()
    ask(session, "s1", sequence=SequencePlace(id=7, start=True))
    session.received(answer(sent(session)[0]))
    ask(session, "s2", sequence=SequencePlace(id=7))
    ask(session, "other")
    sent(session)
    (lost,) = session.broke()
    assert lost.id == "s2"
    assert isinstance(lost.error, SequenceLost)
    session.opened()
    assert names(sent(session)) == ["other"]
    # "other" is before it: order holds for what fails here, too.
    assert ask(session, "s3", sequence=SequencePlace(id=7)) == []
    ask(session, "s4", sequence=SequencePlace(id=7, start=True))
    assert names(sent(session)) == ["s4"]


def test_a_sequence_that_did_not_begin_yet_begins_anew() -> None:
    session = Session()
    session.opened()
    ask(session, "s1", sequence=SequencePlace(id="x", start=True))
    ask(session, "s2", sequence=SequencePlace(id="x"))
    sent(session)
    assert session.broke() == []
    session.opened()
    assert names(sent(session)) == ["s1", "s2"]


def test_a_sequence_goes_on_with_the_token_of_its_server() -> None:
    session = Session()
    session.opened()
    ask(session, "s1", sequence=SequencePlace(id=7, start=True))
    session.received(answer(sent(session)[0]))
    ask(session, "s2", sequence=SequencePlace(id=7))
    sent(session)
    session.received(move())
    assert session.broke() == []
    session.opened()
    assert names(sent(session)) == ["s2"]


def test_a_stream_that_fails_fails_all_that_waits_in_order() -> None:
    session = connected("a", "b")
    sent(session)
    error = InferenceError("gone", code="PERMISSION_DENIED")
    results = session.fail(error)
    assert given_out(results) == ["a", "b"]
    assert [result.error for result in results] == [error, error]
    assert len(session) == 0


@settings(max_examples=150, deadline=None)
@given(data=st.data(), ordered=st.booleans())
def test_every_request_has_one_result_whatever_happens_to_connections(data: st.DataObject, ordered: bool) -> None:
    session = Session(ordered=ordered)
    session.opened()
    count = data.draw(st.integers(1, 12))
    todo = [f"r{number}" for number in range(count)]
    results: list[str] = []
    on_wire: list[pb.ModelInferRequest] = []
    for _ in range(200):
        if not todo and not len(session):
            break
        what = data.draw(st.sampled_from(["add", "send", "answer", "answer", "break", "move"]))
        if what == "add" and todo:
            results += given_out(ask(session, todo.pop(0)))
        elif what == "send" and (request := session.next()) is not None:
            on_wire.append(request)
        elif what == "answer" and on_wire and not session.leaving:
            results += given_out(session.received(answer(on_wire.pop(0))))
        elif what in {"break", "move"}:
            if what == "move":
                session.received(move())
            results += given_out(session.broke())
            on_wire = []
            session.opened()
    while todo or len(session):
        if todo:
            results += given_out(ask(session, todo.pop(0)))
        for request in sent(session):
            on_wire.append(request)
        while on_wire:
            results += given_out(session.received(answer(on_wire.pop(0))))
    assert results == [f"r{number}" for number in range(count)]
