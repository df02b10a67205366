"""`mlmesh status` and `mlmesh routes`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.render import text as t

if TYPE_CHECKING:
    from mlmesh_cli.certificates import WrittenCertificate

_STATE_STYLES = {
    pb.INSTANCE_STATE_READY: ("●", "green"),
    pb.INSTANCE_STATE_STARTING: ("◌", "yellow"),
    pb.INSTANCE_STATE_NOT_READY: ("●", "yellow"),
    pb.INSTANCE_STATE_BACKING_OFF: ("●", "red"),
    pb.INSTANCE_STATE_STOPPING: ("◌", "dim"),
    pb.INSTANCE_STATE_STOPPED: ("○", "dim"),
}


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the one style that all commands use; a column that starts with ">" is right-aligned."""
    result = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False
    )
    for column in columns:
        right = column.startswith(">")
        result.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return result


def state_text(state: pb.InstanceState.ValueType) -> Text:
    """The state of a process as a coloured dot and a word."""
    dot, style = _STATE_STYLES.get(state, ("?", "magenta"))
    return Text(f"{dot} {t.enum_name('INSTANCE_STATE_', pb.InstanceState.Name(state))}", style=style)


def identity(spiffe_id: str) -> str:
    """A SPIFFE id as namespace/account; the whole is in the JSON output and in `mlmesh certs list`."""
    parts = spiffe_id.split("/")
    return f"{parts[4]}/{parts[6]}" if len(parts) == 7 and spiffe_id.startswith("spiffe://") else spiffe_id


def _pids(instance: pb.Instance) -> str:
    return f"{instance.application_pid or '-'}, {instance.sidecar_pid or '-'}"


def _acked(instance: pb.Instance, active: str) -> Text:
    if instance.acked_version == active:
        return Text("✓ acked", style="green")
    return Text(f"{instance.acked_version or 'none'}, not yet {active}", style="yellow")


def instances_table(status: pb.MeshStatus, now: datetime) -> Table:
    """One row a replica: state, identity, processes, restarts, certificate expiry, configuration acknowledged."""
    result = table("instance", "state", "identity", "address", "app, sidecar pid", ">restarts", "certificate", "config")
    for instance in sorted(status.instances, key=lambda i: i.name):
        state = state_text(instance.state)
        if instance.reason and instance.state != pb.INSTANCE_STATE_READY:
            state.append(f"\n{instance.reason}", style="dim")
        restarts = str(instance.restarts) + (f"+{instance.sidecar_restarts}" if instance.sidecar_restarts else "")
        result.add_row(
            instance.name,
            state,
            identity(instance.identity),
            instance.address,
            _pids(instance),
            restarts,
            t.until(instance.certificate_expire_time, now),
            _acked(instance, status.config_version),
        )
    return result


def shares_table(shares: Iterable[pb.SubsetShare]) -> Table:
    """Configured against observed share of each subset, over the window that was asked for."""
    result = table("service", "subset", ">configured", ">observed", "", ">requests", ">failed")
    for share in shares:
        failed = Text(str(share.failures), style="red" if share.failures else "green")
        result.add_row(
            share.host.split(".")[0],
            share.subset or "-",
            t.percent(share.configured_share),
            t.percent(share.observed_share) if share.requests else "-",
            t.bar(share.observed_share),
            f"{share.requests:,}",
            failed,
        )
    return result


def clients_table(clients: Iterable[pb.ProxylessClient]) -> RenderableType:
    """gRPC clients without a sidecar, and what each of them cannot."""
    result = table("client without a sidecar", "dials", "config", "refused, or done without")
    for client in clients:
        notes = [*client.refused, *(f"{text} (does without)" for text in client.does_without)]
        state = client.acked_version or "under way"
        if client.rejection:
            state, notes = "refused", [client.rejection, *notes]
        result.add_row(client.identity, "\n".join(client.targets), state, "\n".join(notes) or "-")
    return result


def status_view(status: pb.MeshStatus, now: datetime) -> RenderableType:
    """Everything that `mlmesh status` prints."""
    ready = sum(1 for i in status.instances if i.state == pb.INSTANCE_STATE_READY)
    head = Text(
        "mesh ready" if status.ready else "mesh not ready", style="bold green" if status.ready else "bold yellow"
    )
    facts = (
        f"{ready}/{len(status.instances)} instances ready",
        f"config {status.config_version or '-'}",
        f"trust domain {status.trust_domain}",
        f"CA expires {t.until(status.ca_expire_time, now)}",
        f"supervisor {status.supervisor_pid}",
        f"started {t.ago(status.start_time, now)}",
    )
    head.append("  ·  " + "  ·  ".join(facts), style="default not bold")
    parts: list[RenderableType] = [head, instances_table(status, now)]
    if status.shares:
        parts.append(shares_table(status.shares))
    parts += [Text(f"gateway {g.gateway} listens on {g.address} ({g.tls_mode})") for g in status.gateways]
    if status.proxyless_clients:
        parts.append(clients_table(status.proxyless_clients))
    if status.metrics_address:
        parts.append(Text(f"Istio's metrics for Prometheus at http://{status.metrics_address}/metrics"))
    return Group(*parts)


def starting_view(status: pb.MeshStatus | None, steps: Sequence[str], elapsed_s: float) -> RenderableType:
    """What `mlmesh up` shows while the mesh starts: the instances once the supervisor answers, and its last word."""
    last = Text(f"{steps[-1] if steps else 'starting the supervisor'}, {elapsed_s:.0f} s", style="yellow")
    if status is None:
        return last
    result = table("instance", "state", "sidecar", "config")
    for instance in sorted(status.instances, key=lambda i: i.name):
        sidecar = f"envoy {instance.sidecar_pid}" if instance.sidecar_pid else "-"
        acked = _acked(instance, status.config_version)
        result.add_row(instance.name, state_text(instance.state), sidecar, acked)
    return Group(result, last)


def routes_view(routes: Iterable[pb.Route]) -> RenderableType:
    """One row a destination, in the order in which rules are tried."""
    result = table(
        "host", "virtual service", "rule", "matches", "subset", ">weight", ">observed", ">requests", ">failed", "policy"
    )
    for route in routes:
        first = (
            route.host.removesuffix(".svc.cluster.local"),
            route.virtual_service or "(default)",
            route.rule or "-",
            route.match or "everything",
        )
        for index, share in enumerate(route.destinations or [pb.SubsetShare(configured_share=-1)]):
            result.add_row(
                *(first if index == 0 else ("", "", "", "")),
                share.subset or (share.host if share.host not in ("", route.host) else "-"),
                t.percent(share.configured_share),
                t.percent(share.observed_share) if share.requests else "-",
                f"{share.requests:,}",
                Text(str(share.failures), style="red" if share.failures else "default"),
                route.policy if index == 0 else "",
            )
    return result if result.row_count else Text("no routes", style="dim")


def changes_view(response: pb.ApplyResponse | pb.DeleteResourcesResponse, *, dry_run: bool) -> RenderableType:
    """What `mlmesh apply` or `mlmesh delete` changed, who acknowledged it and how fast."""
    styles = {"created": "green", "configured": "yellow", "deleted": "red"}
    result = table("resource", "change")
    for change in response.changes:
        action = change.action + (" (dry run)" if dry_run else "")
        # What is of no namespace is called by its name alone.
        result.add_row(f"{change.kind} {change.name.lstrip('/')}", Text(action, style=styles.get(change.action, "dim")))
    parts: list[RenderableType] = [result]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in response.warnings]
    if dry_run:
        parts.append(Text("valid; nothing was changed", style="green"))
    else:
        all_acked = response.acked_sidecars == response.connected_sidecars
        tail = f"configuration {response.config_version} acknowledged by {response.acked_sidecars} of "
        tail += f"{response.connected_sidecars} sidecars in {t.duration(t.seconds(response.ack_latency))}"
        parts.append(Text(tail, style="green" if all_acked else "yellow"))
    return Group(*parts)


def certificate_rows(status: pb.MeshStatus) -> dict[str, object]:
    """The certificates for JSON output."""
    return {
        "certificates": [
            {
                "instance": i.name,
                "identity": i.identity,
                "serial": i.certificate_serial,
                "expire_time": i.certificate_expire_time.ToJsonString(),
            }
            for i in sorted(status.instances, key=lambda i: i.name)
        ],
        "ca_expire_time": status.ca_expire_time.ToJsonString(),
    }


def certificates_table(status: pb.MeshStatus, now: datetime) -> RenderableType:
    """One row a sidecar: the identity that it shows, the serial number, when it expires."""
    result = table("instance", "identity", "serial", "expires")
    for instance in sorted(status.instances, key=lambda i: i.name):
        expires = t.until(instance.certificate_expire_time, now)
        result.add_row(instance.name, instance.identity, instance.certificate_serial or "-", expires)
    return Group(result, Text(f"the certificate authority expires {t.until(status.ca_expire_time, now)}"))


def issued_view(written: WrittenCertificate, now: datetime) -> RenderableType:
    """Where a certificate was written."""
    left = t.duration(written.expires_s - now.timestamp())
    head = Text(f"{written.identity}, valid for {left}", style="green")
    return Group(head, *(Text(f"  {path}") for path in (written.cert, written.key, written.ca)))


def grpcurl_example(written: WrittenCertificate, gateway: str) -> str:
    """A command that lists the services behind the gateway with this certificate."""
    files = f"-cacert {written.ca} -cert {written.cert} -key {written.key}"
    return f"grpcurl {files} -authority inference.mlmesh.svc.cluster.local {gateway} list"
