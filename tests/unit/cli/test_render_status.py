from __future__ import annotations

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.render import status as view
from tests.support.cli import HOST, NOW, instance, mesh_status
from tests.unit.cli.conftest import text_of


def test_status_shows_everything_asked_of_it() -> None:
    text = text_of(view.status_view(mesh_status(), NOW))
    for wanted in (
        "mesh ready",
        "2/2 instances ready",
        "config 7",
        "trust domain cluster.local",
        "started 1 min 30 s ago",
        "mlmesh/toolbox",
        "101, 102",
        "in 23 h",
        "✓ acked",
        "127.0.0.1:8443 (MUTUAL)",
    ):
        assert wanted in text, wanted
    line = next(line for line in text.splitlines() if " v2 " in line)
    assert line.split()[:6] == ["inference", "v2", "10.0", "%", "9.5", "%"]
    assert line.split()[-2:] == ["95", "2"]


def test_a_sidecar_that_lags_behind_shows_both_versions() -> None:
    status = mesh_status()
    status.instances[0].acked_version = "6"
    status.ready = False
    text = text_of(view.status_view(status, NOW))
    assert "6, not yet 7" in text
    assert "mesh not ready" in text


def test_the_reason_of_a_process_that_is_not_ready_is_told() -> None:
    status = mesh_status()
    sick = instance("registry-0", state=pb.INSTANCE_STATE_BACKING_OFF, reason="ended with code 2", restarts=3)
    status.instances.append(sick)
    text = text_of(view.status_view(status, NOW))
    assert "backing off" in text
    assert "ended with code 2" in text
    assert "2/3 instances ready" in text


def test_nothing_is_broken_in_a_terminal_of_80_columns() -> None:
    assert max(len(line) for line in text_of(view.status_view(mesh_status(), NOW), width=80).splitlines()) <= 80


def test_brackets_in_names_are_not_markup() -> None:
    status = mesh_status()
    status.instances[0].reason = "[red]x[/red]"
    status.instances[0].state = pb.INSTANCE_STATE_NOT_READY
    assert "[red]x[/red]" in text_of(view.status_view(status, NOW))


def test_routes_are_in_order_with_a_row_a_destination() -> None:
    split = pb.Route(virtual_service="mlmesh/inference", host=HOST, rule="split", policy="retries 2")
    split.destinations.add(host=HOST, subset="v1", configured_share=0.9, observed_share=0.91, requests=910)
    split.destinations.add(host=HOST, subset="v2", configured_share=0.1, observed_share=0.09, requests=90, failures=1)
    user = pb.Route(virtual_service="mlmesh/inference", host=HOST, rule="ada", match="header x-user is ada")
    user.destinations.add(host=HOST, subset="v2", configured_share=1)
    lines = [line.split() for line in text_of(view.routes_view([user, split]), width=200).splitlines()]
    order = [line for line in lines if "v1" in line or "v2" in line]
    assert [("v2" in line, "ada" in line) for line in order] == [(True, True), (False, False), (True, False)]
    assert "90.0" in order[1]
    assert "91.0" in order[1]
    assert "retries" in order[1]
    # Nobody asked yet: an observed share of nothing is no share.
    assert "0.0" not in order[0]


def test_changes_say_who_acknowledged_and_how_fast() -> None:
    response = pb.ApplyResponse(config_version="8", acked_sidecars=5, connected_sidecars=6, warnings=["v3 has no pods"])
    response.changes.add(kind="VirtualService", name="mlmesh/inference", action="configured")
    response.changes.add(kind="Namespace", name="/shop", action="created")
    response.ack_latency.FromMilliseconds(14)
    text = text_of(view.changes_view(response, dry_run=False))
    assert "VirtualService mlmesh/inference" in text
    assert "Namespace shop" in text
    assert "acknowledged by 5 of 6 sidecars in 14 ms" in text
    assert "warning: v3 has no pods" in text
    dry = text_of(view.changes_view(response, dry_run=True))
    assert "configured (dry run)" in dry
    assert "nothing was changed" in dry
