"""Which filter chain of a listener takes a connection, as Envoy finds it: level by level, without going back.

https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/config/listener/v3/listener_components.proto (FilterChainMatch)
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.requests import Request

MANAGER = "HttpConnectionManager"
TCP_PROXY = "TcpProxy"


def chain_of(listener: Json, request: Request) -> Json | None:
    """The chain for a connection; the default chain where none fits, None where Envoy would close it."""
    left = list(listener.get("filter_chains", ()))
    for level in _LEVELS:
        ranked = [(level(chain.get("filter_chain_match", {}), request), chain) for chain in left]
        best = max((rank for rank, _ in ranked), default=-1)
        if best < 0:
            left = []
            break
        left = [chain for rank, chain in ranked if rank == best]
    if left:
        result: Json = left[0]
        return result
    return listener.get("default_filter_chain")


def network_filter(chain: Json, kind: str) -> Json | None:
    """The configuration of a chain's network filter of a message type, by the last word of its name."""
    for one in chain.get("filters", ()):
        config: Json = one.get("typed_config", {})
        if str(config.get("@type", "")).endswith(f".{kind}"):
            return config
    return None


def inside(blocks: Iterable[Json], address: str) -> int:
    """Longest prefix of CIDR blocks that holds an address, -1 where none does."""
    best = -1
    for block in blocks:
        length = block.get("prefix_len", 0)
        length = int(length.get("value", 0) if isinstance(length, dict) else length)
        try:
            network = ipaddress.ip_network(f"{block.get('address_prefix', '')}/{length}", strict=False)
            if ipaddress.ip_address(address) in network:
                best = max(best, length)
        except ValueError:
            continue
    return best


# Rank of a chain at one level: -1 does not fit, 0 does not say, more is more specific.
_Level = Callable[[Json, Request], int]


def _destination_port(match: Json, request: Request) -> int:
    wanted = match.get("destination_port")
    if wanted is None:
        return 0
    number = int(wanted.get("value", 0) if isinstance(wanted, dict) else wanted)
    return 1 if number == request.port else -1


def _ranges(key: str, of: Callable[[Request], str]) -> _Level:
    def level(match: Json, request: Request) -> int:
        blocks = match.get(key)
        if not blocks:
            return 0
        found = inside(blocks, of(request))
        return found + 1 if found >= 0 else -1

    return level


def _server_names(match: Json, request: Request) -> int:
    names = match.get("server_names")
    if not names:
        return 0
    best = -1
    for name in (str(name).lower() for name in names):
        sni = request.sni.lower()
        if name == sni and sni:
            best = max(best, 10_000)
        elif name.startswith("*.") and sni.endswith(name[1:]):
            best = max(best, len(name))
    return best


def _transport(match: Json, request: Request) -> int:
    wanted = match.get("transport_protocol")
    if not wanted:
        return 0
    return 1 if wanted == ("tls" if request.tls else "raw_buffer") else -1


def _application(match: Json, request: Request) -> int:
    wanted = match.get("application_protocols")
    if not wanted:
        return 0
    return 1 if set(wanted) & set(request.alpn) else -1


def _source_type(match: Json, request: Request) -> int:
    wanted = match.get("source_type", "ANY")
    if wanted == "ANY":
        return 0
    local = request.source == request.destination or request.source.startswith("127.")
    return 1 if (wanted == "SAME_IP_OR_LOOPBACK") == local else -1


_LEVELS: tuple[_Level, ...] = (
    _destination_port,
    _ranges("prefix_ranges", lambda request: request.destination),
    _server_names,
    _transport,
    _application,
    _ranges("direct_source_prefix_ranges", lambda request: request.source),
    _source_type,
    _ranges("source_prefix_ranges", lambda request: request.source),
)
