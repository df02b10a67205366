from __future__ import annotations

import pytest

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.errors import CliError
from mlmesh_cli.measuring import conditions
from mlmesh_cli.render.metrics import metrics_view
from tests.unit.cli.conftest import text_of


def _response() -> pb.GetMetricsResponse:
    response = pb.GetMetricsResponse()
    response.window.FromSeconds(60)
    busy = response.groups.add(
        labels={"source_workload": "client", "destination_workload": "server-v1"},
        requests=120,
        rate=2.0,
        share=0.75,
        errors=12,
        statuses={"0": 108, "8": 10, "http 503": 2},
    )
    busy.p50.FromMilliseconds(3)
    response.groups.add(labels={"source_workload": "client", "destination_workload": "server-v2"}, response_messages=9)
    return response


def test_groups_tell_rates_shares_and_failures_by_status() -> None:
    lines = text_of(metrics_view(_response())).splitlines()
    (busy,) = [line for line in lines if "server-v1" in line]
    assert "120" in busy
    assert "75.0 %" in busy
    assert "10.0 %" in busy
    assert "RESOURCE_EXHAUSTED 10, http 503 2" in busy
    (idle,) = [line for line in lines if "server-v2" in line]
    assert "0, 9" in idle
    # Callers stand before the called.
    assert busy.index("client") < busy.index("server-v1")


def test_silence_is_told() -> None:
    assert "no calls ended" in text_of(metrics_view(pb.GetMetricsResponse()))


def test_conditions_are_names_with_values() -> None:
    assert conditions(["a=b", "c=d=e", "f="], "--where") == {"a": "b", "c": "d=e", "f": ""}
    for wrong in ("a", "=b"):
        with pytest.raises(CliError):
            conditions([wrong], "--where")
