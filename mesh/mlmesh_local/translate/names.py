"""Names of Envoy resources, as Istio gives them, and small pieces of proto-JSON."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json, typed

BLACK_HOLE = "BlackHoleCluster"
"""Cluster without endpoints: calls to it end with UNAVAILABLE."""

COLLECTOR = "opentelemetry-collector"
"""Cluster of the OTLP collector."""

ADS: Json = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
"""Configuration source: the stream that brought the rest, waited for without limit."""

CREDENTIALS_ADS: Json = {**ADS, "initial_fetch_timeout": "1s"}
"""The same for secrets that a `credentialName` names: they may be missing, which must not hold up everything else.

Istio leaves Envoy's 15 s. What there is comes with the cluster or listener that needs it; the rest is not waited for.
"""


def outbound_cluster(port: int, subset: str, host: str) -> str:
    """Cluster of a service's port and subset."""
    return f"outbound|{port}|{subset}|{host}"


def inbound_cluster(port: int) -> str:
    """Cluster of the application behind a sidecar; also the name of the route configuration in front of it."""
    return f"inbound|{port}||"


def sni(port: int, subset: str, host: str) -> str:
    """Server name that sidecars send."""
    return f"outbound_.{port}_.{subset}_.{host}"


def seconds(value: float) -> str:
    """A duration in proto-JSON."""
    text = f"{value:.9f}".rstrip("0").rstrip(".")
    return f"{text}s"


def fraction(percent: float) -> Json:
    """FractionalPercent of a percentage, to a ten-thousandth of a percent as in Istio."""
    return {"numerator": int(percent * 10000), "denominator": "MILLION"}


def address(host: str, port: int) -> Json:
    """core.v3.Address; a host "unix://" and a path is a socket of this machine."""
    if host.startswith("unix://"):
        return {"pipe": {"path": host.removeprefix("unix://")}}
    return {"socket_address": {"address": host, "port_value": port}}


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port"."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def filter_of(name: str, message: str, value: Json | None = None) -> Json:
    """A filter with its configuration."""
    return {"name": name, "typed_config": typed(message, value)}
