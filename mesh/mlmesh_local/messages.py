"""Values of the laptop mesh as messages of its control service."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mlmesh.local.v1 import local_pb2
from mlmesh_local.addresses import ADMIN_PORT
from mlmesh_local.bundles import spiffe_bundle
from mlmesh_local.chaos.disturbance import Blackhole, Disturbance
from mlmesh_local.chaos.faults import ActiveFault
from mlmesh_local.configuration import ApplyOutcome
from mlmesh_local.instance import Instance, State
from mlmesh_local.mesh import Mesh
from mlmesh_local.metrics.queries import Row
from mlmesh_local.metrics.rules import Sent
from mlmesh_local.model import spiffe_id
from mlmesh_local.pki import Certificate
from mlmesh_local.proxyless.status import ClientStatus
from mlmesh_local.routes import Route, configured_shares
from mlmesh_local.stats import Counts, Destination
from mlmesh_local.traces import Span, TraceFilter, TraceSummary

_STATES = {
    State.STARTING: local_pb2.INSTANCE_STATE_STARTING,
    State.READY: local_pb2.INSTANCE_STATE_READY,
    State.NOT_READY: local_pb2.INSTANCE_STATE_NOT_READY,
    State.BACKING_OFF: local_pb2.INSTANCE_STATE_BACKING_OFF,
    State.STOPPING: local_pb2.INSTANCE_STATE_STOPPING,
    State.STOPPED: local_pb2.INSTANCE_STATE_STOPPED,
}


_BLACKHOLES = {
    local_pb2.BLACKHOLE_DIRECTION_REQUESTS: Blackhole.REQUESTS,
    local_pb2.BLACKHOLE_DIRECTION_RESPONSES: Blackhole.RESPONSES,
    local_pb2.BLACKHOLE_DIRECTION_BOTH: Blackhole.BOTH,
}


def mesh_status(mesh: Mesh, observed: Mapping[Destination, Counts]) -> local_pb2.MeshStatus:
    """The state of the whole mesh, with the shares of the given counts."""
    return local_pb2.MeshStatus(
        instances=[_instance(mesh, instance) for instance in mesh.instances],
        gateways=[
            local_pb2.GatewayAddress(gateway=item.gateway, address=item.address, tls_mode=item.tls_mode)
            for item in mesh.gateways()
        ],
        config_version=mesh.configuration.version,
        trust_domain=mesh.configuration.trust_domain or mesh.certificates.authority.trust_domain,
        shares=subset_shares(configured_shares(mesh.resources), observed),
        start_time=timestamp(mesh.start_time),
        supervisor_pid=mesh.pid,
        ca_expire_time=timestamp(mesh.certificates.authority.expire_time),
        ready=mesh.ready,
        metrics_address=mesh.configuration.metrics_address,
        proxyless_clients=[_client(mesh, client) for client in mesh.configuration.clients()],
    )


def _client(mesh: Mesh, client: ClientStatus) -> local_pb2.ProxylessClient:
    domain = mesh.configuration.trust_domain or mesh.configuration.world.trust_domain
    return local_pb2.ProxylessClient(
        node=client.node.id,
        identity=spiffe_id(domain, client.node.namespace, client.node.service_account),
        targets=client.targets,
        acked_version=client.acked_version,
        rejection=client.rejection,
        refused=client.refused,
        does_without=client.does_without,
    )


def issued(certificate: Certificate) -> local_pb2.IssueCertificateResponse:
    """A certificate with its key, for the user's own socket."""
    return local_pb2.IssueCertificateResponse(
        certificate_chain_pem=certificate.chain_pem,
        private_key_pem=certificate.key_pem,
        trust_bundle_pem=certificate.bundle_pem,
        identity=certificate.identity,
        expire_time=timestamp(certificate.not_after),
    )


def subset_shares(
    configured: Mapping[tuple[str, str], float], observed: Mapping[Destination, Counts]
) -> list[local_pb2.SubsetShare]:
    """Configured and observed shares by host and subset."""
    counts: dict[tuple[str, str], Counts] = {}
    totals: dict[str, int] = {}
    for destination, count in observed.items():
        key = (destination.host, destination.subset)
        counts[key] = counts.get(key, Counts()) + count
        totals[destination.host] = totals.get(destination.host, 0) + count.requests
    result: list[local_pb2.SubsetShare] = []
    weighted = {host for host, subset in configured if subset}
    for host, subset in sorted({*configured, *counts}):
        # What has neither subsets nor traffic has nothing to tell.
        if host not in weighted and host not in totals:
            continue
        # A subset that only another rule names has no share of its own here.
        result.append(_share(host, subset, configured, counts, totals.get(host, 0)))
    return result


def _share(
    host: str,
    subset: str,
    configured: Mapping[tuple[str, str], float],
    counts: Mapping[tuple[str, str], Counts],
    total: int,
) -> local_pb2.SubsetShare:
    """Of so many calls those that went to a subset, and the share that it should have; -1 where nothing says so."""
    count = counts.get((host, subset), Counts())
    return local_pb2.SubsetShare(
        host=host,
        subset=subset,
        configured_share=configured.get((host, subset), -1),
        observed_share=count.requests / total if total else 0.0,
        requests=count.requests,
        failures=count.failures,
    )


def route(item: Route, observed: Mapping[Sent, Counts]) -> local_pb2.Route:
    """A rule with what it sent: the shares of its destinations, then what it sent elsewhere before it was changed."""
    configured = {(target.host, target.subset): target.share for target in item.targets}
    counts = item.counts(observed)
    total = sum(count.requests for count in counts.values())
    destinations = [
        _share(host, subset, configured, counts, total)
        for host, subset in (*configured, *sorted(counts.keys() - configured.keys()))
    ]
    return local_pb2.Route(
        virtual_service=item.virtual_service,
        host=item.host,
        rule=item.rule,
        match=item.match,
        destinations=destinations,
        policy=item.policy,
    )


def apply_response(outcome: ApplyOutcome) -> local_pb2.ApplyResponse:
    """What changed."""
    return local_pb2.ApplyResponse(
        changes=[
            local_pb2.ResourceChange(kind=change.kind, name=change.name, action=change.action)
            for change in outcome.changes
        ],
        config_version=outcome.version,
        acked_sidecars=outcome.acked,
        connected_sidecars=outcome.connected,
        ack_latency=duration(round(outcome.ack_latency_s * 1e9)),
        warnings=outcome.warnings,
    )


def delete_response(outcome: ApplyOutcome) -> local_pb2.DeleteResourcesResponse:
    """A removal that was accepted."""
    response = apply_response(outcome)
    return local_pb2.DeleteResourcesResponse(
        changes=response.changes,
        config_version=response.config_version,
        acked_sidecars=response.acked_sidecars,
        connected_sidecars=response.connected_sidecars,
        ack_latency=response.ack_latency,
        warnings=response.warnings,
    )


def fault(item: ActiveFault, *, now: datetime, now_loop: float) -> local_pb2.Fault:
    """A fault that is active; ``now_loop`` is now by the event loop's clock, which its end is told by."""
    return local_pb2.Fault(
        instance=item.instance,
        description=item.description,
        end_time=timestamp(now + timedelta(seconds=item.end - now_loop)),
        connections=item.connections,
    )


def disturbance(fault: local_pb2.NetworkFault) -> Disturbance:
    """What a request asks to be done to connections. Raises InvalidInput."""
    return Disturbance(
        delay_s=fault.delay.ToTimedelta().total_seconds(),
        jitter_s=fault.jitter.ToTimedelta().total_seconds(),
        bytes_per_s=fault.bytes_per_second,
        cut=fault.cut,
        blackhole=_BLACKHOLES.get(fault.blackhole, Blackhole.NONE),
        corrupt=fault.corrupt_percent / 100,
    )


def call_group(row: Row, covered_s: float) -> local_pb2.CallGroup:
    """Calls of one group."""
    return local_pb2.CallGroup(
        labels=row.labels,
        requests=row.requests,
        rate=row.requests / covered_s,
        share=row.share,
        errors=row.errors,
        statuses=row.statuses,
        p50=duration(round(row.quantile_ms(0.5) * 1e6)),
        p90=duration(round(row.quantile_ms(0.9) * 1e6)),
        p99=duration(round(row.quantile_ms(0.99) * 1e6)),
        request_messages=row.messages_received,
        response_messages=row.messages_sent,
    )


def trace_filter(request: local_pb2.ListTracesRequest) -> TraceFilter:
    """Which traces a request asks for."""
    return TraceFilter(
        span_name=request.span_name,
        service=request.service,
        attributes=dict(request.attributes),
        errors_only=request.errors_only,
        min_duration_ns=request.min_duration.ToNanoseconds(),
        start_ns=request.start_time.ToNanoseconds(),
        end_ns=request.end_time.ToNanoseconds() if request.HasField("end_time") else None,
    )


def trace_summary(trace: TraceSummary) -> local_pb2.TraceSummary:
    """A trace in a line."""
    return local_pb2.TraceSummary(
        trace_id=trace.trace_id,
        root_name=trace.root_name,
        start_time=_timestamp_ns(trace.start_ns),
        duration=duration(trace.duration_ns),
        span_count=trace.span_count,
        error=trace.error,
        services=trace.services,
    )


def span(item: Span) -> local_pb2.Span:
    """A span."""
    return local_pb2.Span(
        span_id=item.span_id,
        parent_span_id=item.parent_span_id,
        name=item.name,
        service=item.service,
        kind=item.kind,
        start_time=_timestamp_ns(item.start_ns),
        duration=duration(item.end_ns - item.start_ns),
        attributes=dict(item.attributes),
        error=item.error,
        links=item.links,
    )


def timestamp(time: datetime) -> Timestamp:
    """A point in time."""
    message = Timestamp()
    message.FromDatetime(time)
    return message


def duration(nanoseconds: int) -> Duration:
    """A length of time."""
    message = Duration()
    message.FromNanoseconds(nanoseconds)
    return message


def trust_bundle(mesh: Mesh) -> local_pb2.GetTrustBundleResponse:
    """The roots that are trusted now, in both forms."""
    authority = mesh.certificates.authority
    issuer = mesh.certificates.foreign or authority
    return local_pb2.GetTrustBundleResponse(
        trust_domain=mesh.configuration.trust_domain or authority.trust_domain,
        pem=issuer.bundle_pem,
        spiffe_json=spiffe_bundle(issuer.roots, authority.sequence),
        phase=authority.phase,
    )


def _timestamp_ns(nanoseconds: int) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(nanoseconds)
    return message


def _instance(mesh: Mesh, instance: Instance) -> local_pb2.Instance:
    plan = instance.plan
    workload = plan.workload
    leaf = mesh.certificates.leaf(plan.name)
    node = mesh.configuration.node_status().get(plan.name)
    port = next(iter(workload.ports.values()), 0)
    return local_pb2.Instance(
        name=plan.name,
        workload=workload.name,
        namespace=workload.namespace,
        identity=leaf.identity if leaf else plan.identity,
        labels=dict(workload.labels),
        state=_STATES[instance.state],
        reason=(node.rejection if node else "") or instance.reason,
        address=plan.addresses.pod,
        application_pid=instance.application.pid,
        sidecar_pid=instance.sidecar.pid,
        restarts=instance.application.restarts,
        sidecar_restarts=instance.sidecar.restarts,
        certificate_expire_time=timestamp(leaf.not_after) if leaf else None,
        certificate_begin_time=timestamp(leaf.not_before) if leaf else None,
        certificate_serial=leaf.serial if leaf else "",
        acked_version=node.acked_version if node else "",
        outbound_listeners=[]
        if workload.is_gateway
        else [
            local_pb2.OutboundListener(address=f"{plan.addresses.outbound}:{number}", port=number)
            for number in mesh.outbound_ports()
        ],
        admin_address=f"{plan.addresses.admin}:{ADMIN_PORT}",
        application_address=f"{plan.addresses.application}:{port}" if port and not workload.is_gateway else "",
    )
