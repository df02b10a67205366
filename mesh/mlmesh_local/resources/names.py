"""Names that resources have in each other's fields."""

from __future__ import annotations

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
