"""What Envoy's configuration of one proxy means, apart from how it is arranged.

Both sides are brought to the same tree: outbound routes by port and host, clusters with their endpoints, inbound ports
with what guards them, servers of a gateway. A policy counts where it acts, be it attached to a listener, to a route
configuration or discovered on its own. What a machine without iptables cannot have (capture, and what follows from it)
is left out here; every other difference must be equal or be listed in differences.yaml.
"""

from __future__ import annotations

import functools
import ipaddress
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, LISTENER, ROUTES, Json, build_bytes, canonical
from mlmesh_local.istiod.client import EXTENSION, Resources
from mlmesh_local.istiod.wire import decode
from tests.differential.parts import cluster_meaning, endpoints_meaning, route_meaning, tls_meaning, tracing_meaning

Side = Literal["ours", "theirs"]
Tree = dict[str, Any]

_MANAGER = "HttpConnectionManager"
# Chains and listeners that exist because traffic is captured.
_CAPTURE_CHAINS = (
    "virtualInbound",
    "virtualInbound-blackhole",
    "virtualInbound-catchall-http",
    "PassthroughFilterChain",
)
_SHARES = ("client_sampling", "random_sampling", "overall_sampling", "custom_tags")
_CAPTURE_LISTENERS = ("virtualInbound", "virtualOutbound")
_CAPTURE_CLUSTERS = ("PassthroughCluster", "InboundPassthroughCluster")
# What Envoy does when nothing is said.
_MANAGER_DEFAULTS: dict[str, Any] = {
    "codec_type": "AUTO",
    "http2_protocol_options": {},
    "http_protocol_options": {},
    "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
    "request_id_extension": {
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
            "use_request_id_for_trace_sampling": True,
        }
    },
    "use_remote_address": False,
}


def meaning(resources: Resources, side: Side) -> Tree:
    """The tree of one proxy's configuration."""
    if side == "ours":
        resources = {
            type_url: {name: _built(type_url, canonical(item)) for name, item in found.items()}
            for type_url, found in resources.items()
        }
    return _Meaning(resources, side).tree()


@functools.lru_cache(maxsize=4096)
def _built(type_url: str, text: str) -> Json:
    """A resource as it arrives at Envoy."""
    return decode(type_url, build_bytes(type_url, json.loads(text)))


def short(type_url: str) -> str:
    """The last word of a type."""
    return type_url.rpartition("/")[2].rpartition(".")[2]


class _Meaning:
    def __init__(self, resources: Resources, side: Side) -> None:
        self.side = side
        self.clusters = resources.get(CLUSTER, {})
        self.assignments = resources.get(ENDPOINTS, {})
        self.listeners = resources.get(LISTENER, {})
        self.route_tables = resources.get(ROUTES, {})
        self.extensions = resources.get(EXTENSION, {})

    def tree(self) -> Tree:
        tree: Tree = {"clusters": {}, "endpoints": {}, "outbound": {}, "inbound": {}, "gateway": {}}
        for name, cluster in self.clusters.items():
            if name in _CAPTURE_CLUSTERS:
                continue
            tree["clusters"][name] = cluster_meaning(cluster, self.side)
            assignment = self.assignments.get(name) or cluster.get("load_assignment")
            if assignment and not name.startswith("inbound|"):
                tree["endpoints"][name] = endpoints_meaning(assignment)
        sidecar = any(listener.get("traffic_direction") == "INBOUND" for listener in self.listeners.values())
        sidecar = sidecar or "virtualOutbound" in self.listeners or self._has_outbound_address()
        for name, listener in sorted(self.listeners.items()):
            if name == "virtualInbound":
                self._inbound(tree["inbound"], listener)
            elif name in _CAPTURE_LISTENERS:
                continue
            elif listener.get("traffic_direction") == "INBOUND":
                self._inbound(tree["inbound"], listener)
            elif sidecar:
                self._outbound(tree["outbound"], listener)
            else:
                self._server(tree["gateway"], listener)
        return tree

    def _has_outbound_address(self) -> bool:
        return any(name.startswith("127.64.3.") for name in self.listeners)

    # Inbound: one port a time

    def _inbound(self, into: Tree, listener: Json) -> None:
        own = _port(listener)
        inspectors = [short(f["typed_config"]["@type"]) for f in listener.get("listener_filters", [])]
        for chain in _chains(listener):
            match = dict(chain.get("filter_chain_match") or {})
            port = match.pop("destination_port", None)
            if self.side == "theirs" and listener["name"] == "virtualInbound":
                if chain.get("name") in _CAPTURE_CHAINS or port is None:
                    continue
            else:
                port = own
            entry = into.setdefault(str(port), {"chains": {}})
            if "ProxyProtocol" in inspectors:
                entry["proxy_protocol"] = True
            entry["chains"][_kind(chain, match)] = self._chain(chain, listener)

    # Outbound

    def _outbound(self, into: Tree, listener: Json) -> None:
        port = str(_port(listener))
        found = into.setdefault(port, {})
        for chain in _chains(listener):
            if chain.get("name") in _CAPTURE_CHAINS:
                continue
            match = dict(chain.get("filter_chain_match") or {})
            http = next((f for f in chain.get("filters", []) if short(_type(f)) == _MANAGER), None)
            if http is not None:
                found["http"] = {"manager": self._manager(http["typed_config"])}
                continue
            found.setdefault("tcp", {})[_target(chain)] = {
                "match": _names_only(match),
                "filters": [self._network(f) for f in chain.get("filters", [])],
            }

    # Gateways

    def _server(self, into: Tree, listener: Json) -> None:
        entry = into.setdefault(str(_port(listener)), {"chains": {}})
        filters = [short(f["typed_config"]["@type"]) for f in listener.get("listener_filters", [])]
        if "ProxyProtocol" in filters:
            entry["proxy_protocol"] = True
        for chain in _chains(listener):
            match = dict(chain.get("filter_chain_match") or {})
            names = ",".join(sorted(match.get("server_names", []))) or "*"
            entry["chains"][names] = self._chain(chain, listener)

    # Parts

    def _chain(self, chain: Json, _listener: Json) -> Tree:
        result: Tree = {}
        socket = chain.get("transport_socket")
        result["tls"] = tls_meaning(socket, self.side) if socket else None
        for item in chain.get("filters", []):
            if short(_type(item)) == _MANAGER:
                result["http"] = self._manager(item["typed_config"])
            else:
                result.setdefault("network", []).append(self._network(item))
        return result

    def _network(self, item: Json) -> Tree:
        config = {k: v for k, v in item["typed_config"].items() if k not in ("@type", "stat_prefix", "access_log")}
        if short(_type(item)) == "RBAC":
            config = {"rules": rbac_meaning(config)}
        logs = [_without(log, "filter_state") for log in item["typed_config"].get("access_log", [])]
        if logs:
            config["access_log"] = logs
        return {short(_type(item)): config}

    def _manager(self, config: Json) -> Tree:
        name = config.get("rds", {}).get("route_config_name", "")
        table = self.route_tables.get(name) if name else config.get("route_config")
        overrides = (table or {}).get("typed_per_filter_config", {})
        result = {
            key: value
            for key, value in config.items()
            if key not in ("@type", "rds", "route_config", "http_filters", "stat_prefix", "config_source")
        }
        for key, value in _MANAGER_DEFAULTS.items():
            if result.get(key) == value:
                del result[key]
        tracing = result.pop("tracing", {})
        if "provider" in tracing:
            # Without a provider there is nobody to report to.
            result["tracing"] = {
                key: tracing[key] for key in tracing if key not in _SHARES and tracing[key] is not False
            }
        result["filters"] = self._filters(config.get("http_filters", []), overrides)
        result["hosts"] = self._hosts(table or {}, tracing if "provider" in tracing else None)
        return result

    def _route(self, route: Json, tracing: Json | None) -> Tree:
        own = route.get("tracing", {})
        result = route_meaning({key: value for key, value in route.items() if key != "tracing"}, self.side)
        if tracing is not None and "route" in route:
            result["tracing"] = tracing_meaning(tracing, own)
        return result

    def _filters(self, filters: Iterable[Json], overrides: Mapping[str, Json]) -> Tree:
        order: list[str] = []
        result: Tree = {}
        for item in filters:
            config = item.get("typed_config")
            if "config_discovery" in item:
                found = self.extensions.get(item["name"])
                config = found.get("typed_config") if found else item["config_discovery"].get("default_config")
            config = overridden(config or {}, overrides.get(item["name"]))
            kind = short(config.get("@type", "")) or item["name"]
            value = {key: inner for key, inner in config.items() if key != "@type"}
            if kind == "RBAC":
                rules = rbac_meaning(value)
                if not rules:
                    continue
                kind = f"RBAC {'+'.join(rules)}"
                value = rules
            if kind == "JwtAuthentication":
                if not value.get("providers"):
                    continue
                value["providers"] = {name: _keys_named(one) for name, one in value["providers"].items()}
            while kind in result:
                kind += " again"
            order.append(kind)
            result[kind] = value
        return {"order": order, **result}

    def _hosts(self, table: Json, tracing: Json | None) -> Tree:
        hosts: Tree = {}
        for host in table.get("virtual_hosts", []):
            domains = _domains(host.get("domains", []), ignore_port=table.get("ignore_port_in_host_matching", False))
            if not domains or (domains == ["*"] and not host.get("routes") and "require_tls" not in host):
                # No call means it, or it answers as if it was not there.
                continue
            # The host that takes all has names of its own on each side.
            name = host["name"] if "*" not in domains or "." in host["name"] else "*"
            if "/" in name:
                name = f"{min(domains, key=lambda one: (one.startswith('*'), one))}:{name.rpartition(':')[2]}"
            hosts[name] = {
                **{k: v for k, v in host.items() if k not in ("name", "domains", "routes")},
                "domains": domains,
                "routes": [self._route(route, tracing) for route in host.get("routes", [])],
            }
        return hosts


def overridden(config: Json, override: Json | None) -> Json:
    """The configuration of a filter that a route configuration overrides."""
    if not override:
        return config
    kind = short(override["@type"])
    if kind == "RBACPerRoute":
        return {"@type": ".RBAC", **override.get("rbac", {})}
    return {**config, **override, "@type": config.get("@type", "")}


def rbac_meaning(config: Json) -> Tree:
    """Action (dry runs apart) to policies."""
    result: Tree = {}
    for key, prefix in (("rules", ""), ("shadow_rules", "dry-run ")):
        rules = config.get(key)
        if rules:
            result[prefix + rules.get("action", "ALLOW")] = _flat(rules.get("policies", {}))
    return result


def _flat(value: Any) -> Any:
    """One of one is the one: {"and": [x]} is x."""
    if isinstance(value, list):
        return [_flat(item) for item in value]
    if not isinstance(value, dict):
        return value
    for outer, inner in (("and_rules", "rules"), ("or_rules", "rules"), ("and_ids", "ids"), ("or_ids", "ids")):
        if set(value) == {outer} and len(value[outer].get(inner, [])) == 1:
            return _flat(value[outer][inner][0])
    return {key: _flat(item) for key, item in value.items()}


def _without(value: Json, *names: str) -> Json:
    return {key: item for key, item in value.items() if key not in names}


def _type(item: Json) -> str:
    return str(item.get("typed_config", {}).get("@type", ""))


def _port(listener: Json) -> int:
    return int(listener["address"]["socket_address"].get("port_value", 0))


def _chains(listener: Json) -> list[Json]:
    default = listener.get("default_filter_chain")
    return [*listener.get("filter_chains", []), *([default] if default else [])]


def _kind(chain: Json, match: Json) -> str:
    """What a chain of an inbound port takes."""
    protocols = set(match.get("application_protocols", []))
    if "transport_socket" in chain:
        # With protocols of HTTP only where the port's protocol is found out.
        only_http = protocols and not {"istio", "istio-peer-exchange"} & protocols
        only_tcp = protocols and not {"istio-h2"} & protocols
        return "mesh tls" + (" http" if only_http else "") + (" tcp" if only_tcp else "")
    if match.get("transport_protocol") == "tls":
        return "other tls"
    return "plain" + (" http" if protocols else "")


def _keys_named(provider: Json) -> Json:
    """Each side has a key of its own whose private half nobody has, for issuers whose keys are not known."""
    text = provider.get("local_jwks", {}).get("inline_string", "")
    try:
        keys = json.loads(text)["keys"]
    except (ValueError, KeyError, TypeError):
        return provider
    if [sorted(key) for key in keys] != [["e", "kty", "n"]]:
        return provider
    return {**provider, "local_jwks": "a key that nobody has"}


def _target(chain: Json) -> str:
    """Where a chain of bytes leads: its cluster, or its clusters, behind the names that it matches."""
    match = chain.get("filter_chain_match") or {}
    names = ",".join(sorted(match.get("server_names", [])))
    for item in chain.get("filters", []):
        config = item.get("typed_config", {})
        if "cluster" in config:
            return " ".join(filter(None, (names, config["cluster"])))
        if "weighted_clusters" in config:
            return " ".join(filter(None, (names, *(c["name"] for c in config["weighted_clusters"]["clusters"]))))
    return names or "?"


def _names_only(match: Json) -> Json:
    """Without iptables there are no destination addresses to match; of names the order means nothing."""
    kept = {key: value for key, value in match.items() if key not in ("prefix_ranges", "destination_port")}
    return {**kept, "server_names": sorted(kept["server_names"])} if "server_names" in kept else kept


def _domains(domains: Iterable[str], *, ignore_port: bool) -> list[str]:
    """Without virtual IPs, and a name with any port once where ports do not count."""
    result: set[str] = set()
    names = set(domains)
    for domain in names:
        bare = domain.rpartition(":")[0] if _has_port(domain) else domain
        if _is_address(bare) or "/" in domain:
            # Istio keeps the namespace in names of servers that redirect; no call has such a name.
            continue
        if bare != domain and (ignore_port or bare in names):
            continue
        result.add(domain)
    return sorted(result)


def _has_port(domain: str) -> bool:
    tail = domain.rpartition(":")[2]
    return ":" in domain and (tail.isdigit() or tail == "*") and not _is_address(domain)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True
