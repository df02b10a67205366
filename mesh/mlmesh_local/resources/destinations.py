"""DestinationRule: https://istio.io/latest/docs/reference/config/networking/destination-rule/."""

from __future__ import annotations

from typing import Literal, cast

from mlmesh_local.resources.balancing import load_balancer
from mlmesh_local.resources.checked import duration_s, exports, host, labels, part, selector
from mlmesh_local.resources.domains import domain_problem, is_ip, is_label
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import (
    ClientTls,
    DestinationRule,
    Meta,
    RetryBudget,
    Subset,
    TlsMode,
    TrafficPolicy,
    Tunnel,
)
from mlmesh_local.resources.pools import connection_pool, outlier_detection

_PORT_PARTS = ("connectionPool", "outlierDetection", "loadBalancer", "tls")
_PARTS = (*_PORT_PARTS, "portLevelSettings", "tunnel", "proxyProtocol", "retryBudget")


def parse_destination_rule(meta: Meta, spec: Fields) -> DestinationRule:
    """Read a DestinationRule's spec."""
    subsets: list[Subset] = []
    names: set[str] = set()
    for item in spec.messages("subsets"):
        with item:
            name = item.text("name", required=True)
            if name and not is_label(name):
                item.refuse("name", f'"{name}" is not a DNS label')
            if name in names:
                item.refuse("name", f'the subset "{name}" occurs twice')
            names.add(name)
            policy = part(item, "trafficPolicy", _policy)
            subsets.append(Subset(name=name, labels=labels(item, "labels"), policy=policy, at=item.at))
    selected = selector(spec, "workloadSelector", "matchLabels")
    return DestinationRule(
        meta=meta,
        host=host(spec, "host", wildcard=True),
        policy=part(spec, "trafficPolicy", _policy),
        subsets=tuple(subsets),
        export_to=exports(spec, meta.namespace, own_only=selected is not None),
        selector=selected,
    )


def _policy(fields: Fields) -> TrafficPolicy:
    ports: list[tuple[int, TrafficPolicy]] = []
    ports_named = fields.raw("portLevelSettings")
    if not any(fields.has(name) for name in _PARTS if name != "portLevelSettings") and not (
        ports_named and ports_named.value
    ):
        fields.problems.add(fields.at, "must have at least one setting")
    for item in fields.messages("portLevelSettings"):
        with item:
            number = 0
            if item.required("port"):
                with item.message("port") as inner:
                    number = inner.integer("number") or 0
            item.ignored("port")
            if not any(item.has(name) for name in _PORT_PARTS):
                item.problems.add(item.at, "must have at least one setting")
            ports.append((number, _parts(item)))
    fields.one_of("tunnel", "proxyProtocol")
    base = _parts(fields)
    return TrafficPolicy(
        connection_pool=base.connection_pool,
        outlier=base.outlier,
        load_balancer=base.load_balancer,
        tls=base.tls,
        tunnel=part(fields, "tunnel", _tunnel),
        proxy_protocol=part(fields, "proxyProtocol", _proxy_protocol),
        retry_budget=part(fields, "retryBudget", _retry_budget),
        ports=tuple(ports),
    )


def _parts(fields: Fields) -> TrafficPolicy:
    return TrafficPolicy(
        connection_pool=part(fields, "connectionPool", connection_pool),
        outlier=part(fields, "outlierDetection", outlier_detection),
        load_balancer=part(fields, "loadBalancer", load_balancer),
        tls=part(fields, "tls", client_tls),
    )


def _tunnel(fields: Fields) -> Tunnel:
    protocol = fields.choice("protocol", ("CONNECT", "POST"), "CONNECT")
    target = fields.text("targetHost", required=True)
    if target and not is_ip(target) and domain_problem(target, wildcard=False):
        fields.refuse("targetHost", f'"{target}" is neither a host name nor an IP address')
    return Tunnel(
        protocol=cast('Literal["CONNECT", "POST"]', protocol),
        target_host=target,
        target_port=fields.port("targetPort", required=True),
    )


def _proxy_protocol(fields: Fields) -> Literal["V1", "V2"]:
    return cast('Literal["V1", "V2"]', fields.choice("version", ("V1", "V2"), "V1"))


def _retry_budget(fields: Fields) -> RetryBudget:
    return RetryBudget(
        percent=fields.number("percent", low=0.0, high=100.0),
        min_concurrency=fields.integer("minRetryConcurrency"),
        interval_s=duration_s(fields, "budgetInterval", low_s=0.0),
    )


def client_tls(fields: Fields) -> ClientTls:
    """Read `tls` of a client."""
    mode = fields.choice("mode", ("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"), "DISABLE")
    tls = ClientTls(
        mode=cast("TlsMode", mode),
        client_certificate=fields.text("clientCertificate"),
        private_key=fields.text("privateKey"),
        ca_certificates=fields.text("caCertificates"),
        ca_crl=fields.text("caCrl"),
        credential_name=fields.text("credentialName"),
        subject_alt_names=fields.texts("subjectAltNames"),
        sni=fields.text("sni"),
        insecure_skip_verify=fields.boolean("insecureSkipVerify"),
    )
    _check_tls(fields, tls)
    return tls


def _check_tls(fields: Fields, tls: ClientTls) -> None:
    if tls.mode not in {"SIMPLE", "MUTUAL"}:
        return
    if tls.insecure_skip_verify:
        anchors = ["caCertificates", "subjectAltNames", *(["credentialName"] if tls.mode == "SIMPLE" else [])]
        for name in anchors:
            if fields.has(name):
                fields.refuse("insecureSkipVerify", f'cannot be set together with "{name}"')
    if tls.credential_name:
        for name in ("clientCertificate", "privateKey", "caCertificates", "caCrl"):
            if fields.text(name):
                fields.refuse(name, 'cannot be set together with "credentialName"')
    elif tls.mode == "MUTUAL":
        for name in ("clientCertificate", "privateKey"):
            fields.text(name, required=True)
