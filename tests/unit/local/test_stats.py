from __future__ import annotations

import json

import pytest

from mlmesh_local.stats import Counts, Destination, Traffic, parse_counters, shares

HOST = "inference.mlmesh.svc.cluster.local"
V1 = Destination(host=HOST, subset="v1", port=9000)
V2 = Destination(host=HOST, subset="v2", port=9000)


def counts(requests: int, failures: int = 0) -> Counts:
    return Counts(requests=requests, failures=failures)


def test_counters_of_all_methods_of_an_outbound_cluster_are_added() -> None:
    prefix = f"cluster.outbound|9000|v1|{HOST}.grpc.inference.GRPCInferenceService."
    body = {
        "stats": [
            {"name": f"{prefix}ModelInfer.total", "value": 10},
            {"name": f"{prefix}ModelInfer.success", "value": 8},
            {"name": f"{prefix}ModelInfer.failure", "value": 2},
            {"name": f"{prefix}ModelInfer.14", "value": 2},
            {"name": f"{prefix}ServerLive.total", "value": 5},
            {"name": f"{prefix}ServerLive.success", "value": 5},
            {"name": "cluster.inbound|9000||.grpc.inference.GRPCInferenceService.ModelInfer.total", "value": 99},
            {"name": f"cluster.outbound|9000|v1|{HOST}.upstream_rq_total", "value": 99},
            {"histograms": {}},
        ]
    }
    assert parse_counters(json.dumps(body).encode()) == {V1: counts(15, 2)}


def test_counters_of_a_service_without_subset_and_without_methods() -> None:
    body = {"stats": [{"name": "cluster.outbound|9000||a.b.grpc.total", "value": 3}]}
    assert parse_counters(json.dumps(body).encode()) == {
        Destination(host="a.b", subset="", port=9000): counts(3, 3),
    }


@pytest.mark.parametrize("body", [b"", b"not json"])
def test_an_answer_that_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="Expecting"):
        parse_counters(body)


def test_a_window_sees_what_came_in_it() -> None:
    traffic = Traffic()
    for second, requests in enumerate([0, 90, 100]):
        traffic.record("a", {V1: counts(requests)})
        traffic.sample(float(second * 10))
    assert traffic.observed(20.0, 10.0) == {V1: counts(10)}
    assert traffic.observed(20.0, 20.0) == {V1: counts(100)}
    assert traffic.observed(20.0, 999.0) == {V1: counts(100)}
    assert traffic.observed(25.0, 1.0) == {}


def test_sidecars_are_added_and_a_restarted_one_loses_nothing() -> None:
    traffic = Traffic()
    traffic.record("a", {V1: counts(10, 1), V2: counts(2)})
    traffic.record("b", {V1: counts(5)})
    traffic.record("a", {V1: counts(4, 1)})
    traffic.sample(1.0)
    assert traffic.observed(1.0, 60.0) == {V1: counts(19, 2), V2: counts(2)}


def test_a_restart_that_was_announced_counts_even_when_the_new_count_is_higher() -> None:
    traffic = Traffic()
    traffic.record("a", {V1: counts(10)})
    traffic.restarted("a")
    traffic.record("a", {V1: counts(30)})
    traffic.sample(1.0)
    assert traffic.observed(1.0, 60.0) == {V1: counts(40)}


def test_history_is_bounded() -> None:
    traffic = Traffic(history_s=10.0)
    for second in range(100):
        traffic.record("a", {V1: counts(second)})
        traffic.sample(float(second))
    assert traffic.observed(99.0, 10.0) == {V1: counts(10)}
    # A longer window than the history gives the history's, not the count since the start.
    assert traffic.observed(99.0, 1000.0)[V1].requests <= 99


def test_counting_begins_anew_where_counters_are() -> None:
    traffic = Traffic()
    traffic.record("a", {V1: counts(10, 10)})
    traffic.sample(1.0)
    traffic.begin(2.0)
    assert traffic.observed(2.0, 60.0) == {}
    traffic.record("a", {V1: counts(13, 11)})
    assert traffic.observed(3.0, 60.0) == {V1: counts(3, 1)}


def test_shares() -> None:
    observed = {V1: counts(90), V2: counts(10), Destination(host="other", subset="", port=1): counts(1000)}
    assert shares(observed, HOST) == {"v1": 0.9, "v2": 0.1}
    assert shares(observed, "nobody") == {}
