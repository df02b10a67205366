"""What Istio's validation takes with a warning (IST0133): `istioctl validate` and the webhook print the same.

The rules are those of pkg/config/validation in Istio's source. Warnings that have a code of their own are elsewhere.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mlmesh_local.resources.analysis.cluster import Cluster, Item, Path, listed, mapped
from mlmesh_local.resources.ciphers import is_cipher_suite
from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.model import AuthorizationPolicy, RequestAuthentication
from mlmesh_local.resources.protocols import is_http, parse_protocol
from mlmesh_local.resources.security.warnings import denies_streams, secret_jwks

_SELECTORS = {
    "AuthorizationPolicy": ("selector", "matchLabels"),
    "DestinationRule": ("workloadSelector", "matchLabels"),
    "EnvoyFilter": ("workloadSelector", "labels"),
    "PeerAuthentication": ("selector", "matchLabels"),
    "ProxyConfig": ("selector", "matchLabels"),
    "RequestAuthentication": ("selector", "matchLabels"),
    "ServiceEntry": ("workloadSelector", "labels"),
    "Sidecar": ("workloadSelector", "labels"),
    "Telemetry": ("selector", "matchLabels"),
}
_BODY_BYTES = 100 * 1024
_CERTIFICATES = (
    *("caCrl", "serverCertificate", "privateKey", "caCertificates"),
    *("tlsCertificates", "credentialName", "credentialNames"),
)
_OLD_TLS = ("TLSV1_0", "TLSV1_1")
Warnings = Iterator[tuple[str, Path]]


def analyze_validity(cluster: Cluster) -> None:
    """Look at all of them."""
    for kind, (field, inner) in _SELECTORS.items():
        for item in cluster.items(kind):
            chosen = item.spec.get(field)
            labels = mapped(mapped(chosen).get(inner))
            if chosen is not None and all(value is None for value in labels.values()):
                text = "a selector without labels selects every workload of the namespace"
                cluster.report("IST0133", item, text, "spec", field, offline=True)
    for kind, look in _LOOKS.items():
        for item in cluster.items(kind):
            for text, path in look(item):
                cluster.report("IST0133", item, text, "spec", *path, offline=True)


def _destination_rule(item: Item) -> Warnings:
    # Istio tells it of the policy of the host alone, not of those of its ports and subsets.
    policy = mapped(item.spec.get("trafficPolicy"))
    if mapped(policy.get("outlierDetection")).get("consecutiveErrors"):
        text = '"consecutiveErrors" is deprecated; use consecutiveGatewayErrors or consecutive5xxErrors'
        yield text, ("trafficPolicy", "outlierDetection", "consecutiveErrors")
    balancer = mapped(policy.get("loadBalancer"))
    if mapped(balancer.get("consistentHash")).get("minimumRingSize"):
        text = '"minimumRingSize" is deprecated; use ringHash.minimumRingSize'
        yield text, ("trafficPolicy", "loadBalancer", "consistentHash", "minimumRingSize")
    for name in ("localityLbSetting", "zoneAwareLbSetting"):
        setting = mapped(balancer.get(name))
        if (setting.get("failover") or setting.get("failoverPriority")) and policy.get("outlierDetection") is None:
            text = 'failover needs "outlierDetection": without it no endpoint is found to be unhealthy'
            yield text, ("trafficPolicy", "loadBalancer", name)


def _gateway(item: Item) -> Warnings:
    for index, server in enumerate(map(mapped, listed(item.spec.get("servers")))):
        tls, protocol = mapped(server.get("tls")), str(mapped(server.get("port")).get("protocol", ""))
        if tls.get("httpsRedirect") and not is_http(parse_protocol(protocol) or "unknown"):
            text = f"httpsRedirect acts at servers of protocol HTTP only, not {protocol}"
            yield text, ("servers", index, "tls", "httpsRedirect")
        if server.get("tls") is not None:
            for text, path in _server_tls(tls):
                yield text, ("servers", index, "tls", *path)


def _server_tls(tls: Mapping[str, Any]) -> Warnings:
    suites = [str(name) for name in listed(tls.get("cipherSuites"))]
    if tls.get("minProtocolVersion") in _OLD_TLS and not suites:
        text = f'{tls["minProtocolVersion"]} needs "cipherSuites": those that it can use are no defaults any more'
        yield text, ("minProtocolVersion",)
    unknown = sorted({name for name in suites if not is_cipher_suite(name)})
    if unknown:
        yield f"unknown cipher suites are left out: {', '.join(unknown)}", ("cipherSuites",)
    twice = sorted(name for name, count in Counter(suites).items() if count > 1 and name not in unknown)
    if twice:
        yield f"cipher suites that occur twice: {', '.join(twice)}", ("cipherSuites",)
    mode = tls.get("mode", "PASSTHROUGH")
    if mode in ("PASSTHROUGH", "AUTO_PASSTHROUGH") and any(tls.get(name) for name in _CERTIFICATES):
        yield f"mode {mode} uses no certificates: those that are named have no effect", ("mode",)


def _service_entry(item: Item) -> Warnings:
    spec, resolution = item.spec, item.spec.get("resolution", "NONE")
    if spec.get("workloadSelector") is not None and resolution == "NONE":
        yield "workloadSelector means nothing with resolution NONE; use STATIC", ("workloadSelector",)
    hosts = [str(host) for host in listed(spec.get("hosts"))]
    for index, host in enumerate(hosts):
        if resolution != "DYNAMIC_DNS" and "*" in host and not host.startswith("*."):
            yield f'"{host}": a wildcard stands for whole labels, such as *.example.com', ("hosts", index)
    if resolution in ("DNS", "DNS_ROUND_ROBIN") and len(hosts) > 1 and spec.get("addresses"):
        protocols = [str(port.get("protocol", "")).upper() for port in map(mapped, listed(spec.get("ports")))]
        if any(protocol in ("TCP", "HTTPS", "TLS", "MONGO", "REDIS", "MYSQL") for protocol in protocols):
            yield "several hosts cannot be told apart at an address and a TCP port", ("hosts",)


def _sidecar(item: Item) -> Warnings:
    for index, ingress in enumerate(map(mapped, listed(item.spec.get("ingress")))):
        port = mapped(ingress.get("port"))
        protocol = str(port.get("protocol", ""))
        if mapped(ingress.get("connectionPool")).get("http") is not None and not is_http(
            parse_protocol(protocol) or "unknown"
        ):
            text = f"of protocol {protocol or 'unknown'} only settings of TCP act, not those of HTTP"
            yield text, ("ingress", index, "connectionPool", "http")
        if ingress.get("tls") is not None:
            for text, path in _server_tls(mapped(ingress.get("tls"))):
                yield text, ("ingress", index, "tls", *path)
    for index, egress in enumerate(map(mapped, listed(item.spec.get("egress")))):
        seen: dict[str, set[str]] = {}
        for number, text in enumerate(listed(egress.get("hosts"))):
            scope, slash, host = str(text).partition("/")
            if not slash or scope.startswith("~"):
                continue
            known = seen.setdefault(item.namespace if scope == "." else scope, set())
            if known & {host, "*"} if host != "*" else known:
                yield f'"{text}" is named twice', ("egress", index, "hosts", number)
            known.add(host)
        if "*" in seen.get("*", ()) and len(seen) > 1:
            yield '"*/*" selects every host: the others mean nothing', ("egress", index, "hosts")


def _virtual_service(item: Item) -> Warnings:
    yield from _gateway_names(item.spec, ())
    for name in ("http", "tls", "tcp"):
        for index, rule in enumerate(map(mapped, listed(item.spec.get(name)))):
            for number, match in enumerate(map(mapped, listed(rule.get("match")))):
                yield from _gateway_names(match, (name, index, "match", number))
                for place, host in enumerate(listed(match.get("sniHosts"))):
                    if is_ip(str(host)):
                        text = f'"{host}" is an IP address: clients send none as server name'
                        yield text, (name, index, "match", number, "sniHosts", place)
            if name == "http":
                yield from _http(rule, (name, index))


def _http(rule: Mapping[str, Any], place: Path) -> Warnings:
    for name in ("mirrorPercent", "mirror_percent"):
        if rule.get(name) is not None:
            yield f'"{name}" is deprecated; use mirrorPercentage', (*place, name)
    body = mapped(mapped(rule.get("directResponse")).get("body"))
    if max(len(str(body.get("string", "")).encode()), _decoded_bytes(str(body.get("bytes", "")))) > _BODY_BYTES:
        text = f"more than {_BODY_BYTES // 1024} KiB are sent to every proxy with every change of routes"
        yield text, (*place, "directResponse", "body")


def _decoded_bytes(text: str) -> int:
    try:
        return len(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return 0


def _gateway_names(holder: Mapping[str, Any], place: Path) -> Warnings:
    for index, name in enumerate(listed(holder.get("gateways"))):
        if "/" in str(name):
            continue
        parts = str(name).split(".")
        if len(parts) > 1:
            text = f'"{name}" is an old form of a gateway\'s name; write {parts[1]}/{parts[0]}'
            yield text, (*place, "gateways", index)
        return


def _workload_entry(item: Item) -> Warnings:
    if not item.spec.get("address") and item.spec.get("network"):
        yield f'without address it is reached by the gateway of the network "{item.spec["network"]}" only', ()


def _authorization_policy(item: Item) -> Warnings:
    policy = item.resource.spec if item.resource else None
    if isinstance(policy, AuthorizationPolicy):
        for index, text in denies_streams(policy):
            yield text, ("rules", index)


def _request_authentication(item: Item) -> Warnings:
    found = item.resource.spec if item.resource else None
    if isinstance(found, RequestAuthentication):
        for index, text in secret_jwks(found):
            yield text, ("jwtRules", index, "jwks")


def _telemetry(item: Item) -> Warnings:
    tracing = [mapped(one) for one in listed(item.spec.get("tracing"))]
    if len(tracing) > 1:
        yield "only the first tracing acts", ("tracing",)
    for index, one in enumerate(tracing):
        if len(listed(one.get("providers"))) > 1:
            yield "only one provider of tracing is supported", ("tracing", index, "providers")
    for index, metrics in enumerate(map(mapped, listed(item.spec.get("metrics")))):
        for number, override in enumerate(map(mapped, listed(metrics.get("overrides")))):
            if "" in mapped(override.get("tagOverrides")):
                yield "the name of a tag is empty", ("metrics", index, "overrides", number, "tagOverrides")


def _envoy_filter(_item: Item) -> Warnings:
    yield "an EnvoyFilter depends on what proxies look like inside, which may change with every release", ()


_LOOKS = {
    "AuthorizationPolicy": _authorization_policy,
    "DestinationRule": _destination_rule,
    "EnvoyFilter": _envoy_filter,
    "Gateway": _gateway,
    "RequestAuthentication": _request_authentication,
    "ServiceEntry": _service_entry,
    "Sidecar": _sidecar,
    "Telemetry": _telemetry,
    "VirtualService": _virtual_service,
    "WorkloadEntry": _workload_entry,
}
