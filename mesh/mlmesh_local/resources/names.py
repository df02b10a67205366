"""Names that resources have in each other's fields."""

from __future__ import annotations

import re

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAMESPACE = re.compile(rf"{_DNS_LABEL}")
_KEY = re.compile(rf"({_DNS_LABEL}(\.{_DNS_LABEL})*/)?(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_PORT = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_MAX = 63
_PORT_MAX = 15
_PREFIX_MAX = 253

MESH_GATEWAY = "mesh"
"""What a VirtualService calls all sidecars."""


def full_host(host: str, namespace: str, domain: str) -> str:
    """Istio's expansion of short names: what has no dot is a service of the resource's namespace."""
    if "." in host or host == "*" or not host:
        return host
    return f"{host}.{namespace}.svc.{domain}"


def full_gateway(name: str, namespace: str) -> str:
    """ "{namespace}/{name}" of a gateway that a VirtualService names; "mesh" stays.

    Of the form "name.namespace", once the only one, what follows the namespace does not count.
    """
    if name == MESH_GATEWAY:
        return name
    scope, slash, rest = name.partition("/")
    if slash:
        return f"{namespace}/{rest}" if scope == "." else name
    short, dot, rest = name.partition(".")
    return f"{rest.partition('.')[0]}/{short}" if dot else f"{namespace}/{name}"


def exported_to(targets: tuple[str, ...], namespace: str, client_namespace: str) -> bool:
    """Whether what a namespace exports to targets ("*", ".", namespaces) is there for clients of another."""
    return any(t in ("*", client_namespace) or (t == "." and namespace == client_namespace) for t in targets)


def is_namespace(text: str) -> bool:
    """Whether Kubernetes takes it as the name of a namespace."""
    return len(text) <= _LABEL_MAX and _NAMESPACE.fullmatch(text) is not None


def key_problem(key: str) -> str:
    """What Kubernetes finds wrong with the key of a label or an annotation, or empty."""
    # Annotations may have capitals before the slash.
    prefix, slash, name = key.rpartition("/")
    if _KEY.fullmatch(key.lower()) and len(name) <= _LABEL_MAX and len(prefix) <= _PREFIX_MAX:
        return ""
    what = "" if slash else ", after a domain and a slash if need be"
    return f'"{key}" is not a key: up to {_LABEL_MAX} letters, digits, "-", "_" and "."{what}'


def value_problem(value: str) -> str:
    """What Kubernetes finds wrong with the value of a label, or empty."""
    if len(value) <= _LABEL_MAX and _VALUE.fullmatch(value):
        return ""
    return f'"{value}" is not the value of a label: up to {_LABEL_MAX} letters, digits, "-", "_" and "."'


def is_service_name(text: str) -> bool:
    """Whether Kubernetes takes it as the name of a Service (RFC 1035)."""
    return len(text) <= _LABEL_MAX and _SERVICE.fullmatch(text) is not None


def is_port_name(text: str) -> bool:
    """Whether Kubernetes takes it as the name of a container's port (RFC 6335)."""
    return len(text) <= _PORT_MAX and _PORT.fullmatch(text) is not None
