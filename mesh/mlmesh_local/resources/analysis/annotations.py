"""Annotations that Istio knows, and on which kinds: https://istio.io/latest/docs/reference/config/annotations/."""

from __future__ import annotations

import re

from mlmesh_local.resources.fields import is_cidr

# Which are deprecated, on which kinds, and their names.
_GROUPS: tuple[tuple[bool, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        True,
        ("Service",),
        (
            "alpha.istio.io/canonical-serviceaccounts",
            "alpha.istio.io/kubernetes-serviceaccounts",
        ),
    ),
    (
        False,
        ("Pod",),
        (
            "ambient.istio.io/bypass-inbound-capture",
            "ambient.istio.io/dns-capture",
            "ambient.istio.io/redirection",
            "inject.istio.io/templates",
            "istio.io/reroute-virtual-interfaces",
            "istio.io/rev",
            "prometheus.istio.io/merge-metrics",
            "proxy.istio.io/config",
            "proxy.istio.io/overrides",
            "readiness.status.sidecar.istio.io/applicationPorts",
            "readiness.status.sidecar.istio.io/failureThreshold",
            "readiness.status.sidecar.istio.io/initialDelaySeconds",
            "readiness.status.sidecar.istio.io/periodSeconds",
            "sidecar.istio.io/agentLogLevel",
            "sidecar.istio.io/bootstrapOverride",
            "sidecar.istio.io/componentLogLevel",
            "sidecar.istio.io/interceptionMode",
            "sidecar.istio.io/logLevel",
            "sidecar.istio.io/nativeSidecar",
            "sidecar.istio.io/proxyCPU",
            "sidecar.istio.io/proxyCPULimit",
            "sidecar.istio.io/proxyImage",
            "sidecar.istio.io/proxyImageType",
            "sidecar.istio.io/proxyMemory",
            "sidecar.istio.io/proxyMemoryLimit",
            "sidecar.istio.io/rewriteAppHTTPProbers",
            "sidecar.istio.io/statsEvictionInterval",
            "sidecar.istio.io/statsFlushInterval",
            "sidecar.istio.io/statsHistogramBins",
            "sidecar.istio.io/statsHistogramBuckets",
            "sidecar.istio.io/status",
            "sidecar.istio.io/userVolume",
            "sidecar.istio.io/userVolumeMount",
            "status.sidecar.istio.io/port",
            "traffic.sidecar.istio.io/excludeInboundPorts",
            "traffic.sidecar.istio.io/excludeInterfaces",
            "traffic.sidecar.istio.io/excludeOutboundIPRanges",
            "traffic.sidecar.istio.io/excludeOutboundPorts",
            "traffic.sidecar.istio.io/includeInboundPorts",
            "traffic.sidecar.istio.io/includeOutboundIPRanges",
            "traffic.sidecar.istio.io/includeOutboundPorts",
        ),
    ),
    (False, ("GatewayClass", "Gateway"), ("ambient.istio.io/waypoint-inbound-binding",)),
    (
        False,
        ("Any",),
        (
            "galley.istio.io/analyze-suppress",
            "gateway.istio.io/controller-version",
        ),
    ),
    (
        False,
        ("Gateway",),
        (
            "gateway.istio.io/name-override",
            "gateway.istio.io/service-account",
            "networking.istio.io/service-type",
        ),
    ),
    (
        False,
        ("WorkloadEntry",),
        (
            "istio.io/autoRegistrationGroup",
            "istio.io/connectedAt",
            "istio.io/disconnectedAt",
            "istio.io/workloadController",
        ),
    ),
    (False, ("AuthorizationPolicy",), ("istio.io/dry-run",)),
    (False, ("Service", "ServiceEntry", "Namespace"), ("istio.io/use-waypoint-canary-weight",)),
    (False, ("Ingress",), ("kubernetes.io/ingress.class",)),
    (
        False,
        ("Service",),
        (
            "networking.istio.io/exportTo",
            "traffic.istio.io/nodeSelector",
        ),
    ),
    (False, ("Namespace", "Service", "ServiceEntry"), ("networking.istio.io/traffic-distribution",)),
    (
        True,
        ("Pod",),
        (
            "sidecar.istio.io/discoveryAddress",
            "sidecar.istio.io/extraStatTags",
            "sidecar.istio.io/inject",
            "sidecar.istio.io/statsCompression",
            "sidecar.istio.io/statsInclusionPrefixes",
            "sidecar.istio.io/statsInclusionRegexps",
            "sidecar.istio.io/statsInclusionSuffixes",
            "traffic.sidecar.istio.io/kubevirtInterfaces",
        ),
    ),
    (False, ("Namespace",), ("topology.istio.io/controlPlaneClusters",)),
)
KNOWN: dict[str, tuple[bool, tuple[str, ...]]] = {
    name: (deprecated, kinds) for deprecated, kinds, names in _GROUPS for name in names
}
"""Whether an annotation is deprecated, and the kinds that it is for; "Any" for all."""

IGNORED = frozenset({"sidecar.istio.io/status", "gateway.istio.io/controller-version", "istio.io/rev"})
"""Annotations that Istio sets itself."""

_NUMBER = re.compile(r"^[0-9]{1,10}\Z")
_QUANTITY = re.compile(r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?\Z")


def check(name: str, value: str) -> str:
    """What is wrong with the value of an annotation; empty when nothing is. Only pods' annotations have rules."""
    short = name.rpartition("/")[2]
    if short in {"failureThreshold", "initialDelaySeconds", "periodSeconds"}:
        return "" if _NUMBER.match(value) else "must be a whole number"
    if short.endswith(("InboundPorts", "OutboundPorts")):
        return _ports(value, wildcard=short.startswith("include"))
    if short.endswith("OutboundIPRanges"):
        ranges = [word.strip() for word in value.split(",") if word.strip()]
        fine = (short.startswith("include") and value == "*") or all(is_cidr(word) for word in ranges)
        return "" if fine else "must be a list of IP blocks"
    if short in {"proxyCPU", "proxyMemory", "proxyCPULimit", "proxyMemoryLimit"}:
        return "" if _QUANTITY.match(value) else "must be a quantity"
    if short == "interceptionMode":
        return "" if value in {"REDIRECT", "TPROXY", "NONE"} else "must be REDIRECT, TPROXY or NONE"
    return ""


def _ports(value: str, *, wildcard: bool) -> str:
    if wildcard and value == "*":
        return ""
    words = [word.strip() for word in value.split(",") if word.strip()]
    fine = all(word.isdigit() and int(word) <= 65535 for word in words)
    return "" if fine else "must be a list of ports"
