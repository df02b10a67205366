"""PeerAuthentication: https://istio.io/latest/docs/reference/config/security/peer_authentication/."""

from __future__ import annotations

from typing import cast

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import Meta, MtlsMode, PeerAuthentication
from mlmesh_local.resources.security.scope import selector

_MODES = ("UNSET", "DISABLE", "PERMISSIVE", "STRICT")
_PORT_MAX = 65535


def parse_peer_authentication(meta: Meta, spec: Fields) -> PeerAuthentication:
    """Read a PeerAuthentication's spec."""
    selected = selector(spec)
    mode = _mtls(spec, "mtls")
    ports: list[tuple[int, MtlsMode]] = []
    present = spec.has("portLevelMtls")
    with spec.message("portLevelMtls") as inner:
        for key in inner.names():
            port_mode = _mtls(inner, key)
            if key.isascii() and key.isdigit() and 0 < int(key) <= _PORT_MAX:
                ports.append((int(key), port_mode))
            else:
                inner.refuse(key, f"is not a port number, 1 to {_PORT_MAX}")
        if present and not inner.names():
            spec.refuse("portLevelMtls", "must have at least one port")
    if ports and not selected:
        spec.refuse("portLevelMtls", 'needs a "selector" with labels: ports are those of a workload')
    return PeerAuthentication(meta=meta, selector=selected, mode=mode, ports=tuple(sorted(ports)))


def _mtls(fields: Fields, name: str) -> MtlsMode:
    with fields.message(name) as inner:
        return cast("MtlsMode", inner.choice("mode", _MODES, "UNSET"))
