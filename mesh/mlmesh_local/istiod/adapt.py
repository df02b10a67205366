"""Istio's configuration of a captured pod, made fit for an upstream Envoy on a machine without iptables.

What is changed, and nothing else:

- a sidecar's listener for all inbound traffic becomes a listener for each port, at the pod's address;
- listeners for outbound traffic bind the address at which the application dials; what serves captured connections to
  unknown destinations is left out, and a port that several TCP services share leads to the first of them by address;
- a gateway's listeners bind the pod's address, and the address for callers outside of the mesh;
- inbound clusters dial the application at its own address instead of the connection's original destination;
- secrets come from the control plane instead of from an agent beside Envoy, files that rules name from the files;
- filters, loggers and options of types that upstream Envoy does not have are left out;
- clusters keep the statistics' names that the laptop mesh reads.
"""

from __future__ import annotations

import copy
import dataclasses
import ipaddress
from typing import Any, Final

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES, Json
from mlmesh_local.istiod.wire import OPAQUE
from mlmesh_local.model import TRUST_SECRET, WORKLOAD_SECRET, ProxyNode, World
from mlmesh_local.translate import View, reporting
from mlmesh_local.translate.gateway_servers import listening_port
from mlmesh_local.translate.names import ADS, CREDENTIALS_ADS
from mlmesh_local.translate.tls import SYSTEM_ROOTS

_VIRTUAL_INBOUND: Final = "virtualInbound"
_VIRTUAL_OUTBOUND: Final = "virtualOutbound"
_PASSTHROUGH: Final = "PassthroughCluster"
_INBOUND_PASSTHROUGH: Final = "InboundPassthroughCluster"
_FILE_CERTIFICATE: Final = "file-cert:"
_FILE_ROOTS: Final = "file-root:"
_ORIGINAL_DST: Final = "envoy.filters.listener.original_dst"
_TLS_INSPECTOR: Final = "envoy.filters.listener.tls_inspector"
_NO_HEADERS: Final[reporting.Headers] = (frozenset(), frozenset())
_HTTP_INSPECTOR: Final = "envoy.filters.listener.http_inspector"

Resources = dict[str, dict[str, Json]]


def adapt(resources: Resources, proxy: ProxyNode) -> Resources:
    """Configuration of one proxy, as its Envoy can run it."""
    clean: Resources = _without_unknown(copy.deepcopy(resources))
    return {
        CLUSTER: _clusters(clean.get(CLUSTER, {}), proxy),
        ENDPOINTS: clean.get(ENDPOINTS, {}),
        LISTENER: _listeners(clean.get(LISTENER, {}), proxy),
        ROUTES: clean.get(ROUTES, {}),
        EXTENSIONS: clean.get(EXTENSIONS, {}),
    }


def detoured(resources: Resources, world: World) -> Resources:
    """With the addresses at which endpoints are dialled while connections to them are disturbed on purpose."""
    pods = {proxy.id: proxy.pod_address for proxy in world.proxies}
    elsewhere = {
        (pods[endpoint.instance], endpoint.target_port): endpoint.address
        for endpoint in world.endpoints
        if endpoint.instance in pods and endpoint.address != pods[endpoint.instance]
    }
    for assignment in resources[ENDPOINTS].values() if elsewhere else ():
        for group in assignment.get("endpoints", []):
            for item in group.get("lb_endpoints", []):
                socket = item["endpoint"]["address"].get("socket_address", {})
                address = elsewhere.get((socket.get("address"), socket.get("port_value")))
                if address:
                    socket["address"] = address
    return resources


def listening(proxy: ProxyNode, view: View) -> ProxyNode:
    """The proxy with its addresses outside by the ports that it listens on: Istio's listeners have these."""
    if not proxy.extra_addresses:
        return proxy
    services = view.services.values()
    extra = tuple((listening_port(services, proxy, port), address) for port, address in proxy.extra_addresses)
    return dataclasses.replace(proxy, extra_addresses=extra)


def reported(resources: Resources, view: View, proxy: ProxyNode) -> Resources:
    """With the reports of every call that the laptop's metrics are made of, and access logs in the sidecar's file."""
    role: reporting.Role = "gateway" if proxy.kind == "gateway" else "outbound"
    result = {**resources, CLUSTER: reporting.clusters(view, proxy, resources[CLUSTER])}
    for listener in resources[LISTENER].values():
        here: reporting.Role = "inbound" if listener.get("traffic_direction") == "INBOUND" else role
        for chain in listener["filter_chains"]:
            for item in chain.get("filters", []):
                config = item.get("typed_config", {})
                if config.get("@type", "").endswith("HttpConnectionManager"):
                    logger = reporting.http_logger(view, here, _NO_HEADERS)
                elif config.get("@type", "").endswith("TcpProxy"):
                    logger = reporting.tcp_logger(view, here)
                else:
                    continue
                config["access_log"] = [*_logs(config, proxy), *([logger] if logger else [])]
    return result


def _logs(config: Json, proxy: ProxyNode) -> list[Json]:
    """Access logs; what goes to the standard output of Envoy in a pod goes to the sidecar's file here."""
    logs: list[Json] = config.get("access_log", [])
    for log in logs:
        if log.get("typed_config", {}).get("path") == "/dev/stdout" and proxy.access_log_path:
            log["typed_config"]["path"] = proxy.access_log_path
    return logs


def _clusters(clusters: dict[str, Json], proxy: ProxyNode) -> dict[str, Json]:
    result: dict[str, Json] = {}
    for name, found in clusters.items():
        if name == _INBOUND_PASSTHROUGH:
            continue
        cluster = {key: value for key, value in found.items() if key != "alt_stat_name"}
        if name.startswith("inbound|"):
            cluster = _inbound_cluster(cluster, proxy)
        elif name == _PASSTHROUGH:
            # Calls to unknown hosts have nowhere to pass through to.
            cluster = {"name": name, "type": "STATIC", "connect_timeout": "1s"}
        result[name] = cluster
    return result


def _inbound_cluster(cluster: Json, proxy: ProxyNode) -> Json:
    port = int(cluster["name"].split("|")[1])
    kept = {k: v for k, v in cluster.items() if k not in ("lb_policy", "cleanup_interval", "upstream_bind_config")}
    endpoint = {"endpoint": {"address": _address(proxy.application_address, port)}}
    load = {"cluster_name": cluster["name"], "endpoints": [{"lb_endpoints": [endpoint]}]}
    return {**kept, "type": "STATIC", "load_assignment": load}


def _listeners(listeners: dict[str, Json], proxy: ProxyNode) -> dict[str, Json]:
    result: dict[str, Json] = {}
    taken: set[int] = set()
    # Names of HTTP listeners begin with 0.0.0.0, which comes before every other address.
    for name, listener in sorted(listeners.items(), key=lambda item: _place(item[0])):
        if name == _VIRTUAL_OUTBOUND:
            continue
        if name == _VIRTUAL_INBOUND:
            made = _inbound_listeners(listener, proxy)
        elif proxy.kind == "gateway":
            made = [_gateway_listener(listener, proxy)]
        else:
            made = _outbound_listener(listener, proxy, taken)
        result.update((one["name"], one) for one in made)
    return result


def _place(name: str) -> tuple[int, str]:
    address = name.rpartition("_")[0]
    try:
        return (int(ipaddress.ip_address(address)), name)
    except ValueError:
        return (1 << 128, name)


def _inbound_listeners(listener: Json, proxy: ProxyNode) -> list[Json]:
    chains: dict[int, list[Json]] = {}
    for chain in listener.get("filter_chains", []):
        match = dict(chain.get("filter_chain_match", {}))
        port = match.pop("destination_port", 0)
        if port in proxy.container_ports.values() or _is_service_port(chain, port):
            chains.setdefault(port, []).append({**chain, "filter_chain_match": match})
    return [
        {
            "name": f"{proxy.pod_address}_{port}",
            "address": _address(proxy.pod_address, port),
            "traffic_direction": "INBOUND",
            "listener_filters": _inspectors(listener, found),
            "filter_chains": found,
        }
        for port, found in sorted(chains.items())
    ]


def _is_service_port(chain: Json, port: int) -> bool:
    return bool(port) and chain.get("name") == f"0.0.0.0_{port}"


def _inspectors(listener: Json, chains: list[Json]) -> list[Json]:
    """The listener filters that the chains need, for every port."""
    matches = [chain["filter_chain_match"] for chain in chains]
    needed = {_TLS_INSPECTOR} if any("transport_protocol" in match for match in matches) else set()
    if any("http/1.1" in match.get("application_protocols", ()) for match in matches):
        needed.add(_HTTP_INSPECTOR)
    return [
        {key: value for key, value in item.items() if key != "filter_disabled"}
        for item in listener.get("listener_filters", [])
        if item["name"] in needed or item["name"] not in (_TLS_INSPECTOR, _HTTP_INSPECTOR, _ORIGINAL_DST)
    ]


def _outbound_listener(listener: Json, proxy: ProxyNode, taken: set[int]) -> list[Json]:
    port = listener["address"]["socket_address"]["port_value"]
    if port in taken:
        return []
    taken.add(port)
    chains = []
    for chain in listener.get("filter_chains", []):
        match = {k: v for k, v in chain.get("filter_chain_match", {}).items() if k != "prefix_ranges"}
        chains.append({**chain, "filter_chain_match": match})
    default = listener.get("default_filter_chain")
    if default and default.get("name") != "PassthroughFilterChain":
        chains.append(default)
    if len(chains) == 1 and "server_names" not in chains[0].get("filter_chain_match", {}):
        # What else would have been passed through is not served: nothing is left to tell apart.
        chains[0]["filter_chain_match"] = {}
    chains = _distinct(chains)
    return [
        {
            "name": f"{proxy.outbound_address}_{port}",
            "address": _address(proxy.outbound_address, port),
            "traffic_direction": "OUTBOUND",
            "listener_filters": _inspectors(listener, chains) if len(chains) > 1 else _for_names(listener, chains),
            "filter_chains": chains,
        }
    ]


def _for_names(listener: Json, chains: list[Json]) -> list[Json]:
    return _inspectors(listener, chains) if any(c.get("filter_chain_match") for c in chains) else []


def _distinct(chains: list[Json]) -> list[Json]:
    """Chains that differed by destination address only: the first of each match."""
    seen: list[Json] = []
    result: list[Json] = []
    for chain in chains:
        match = chain.get("filter_chain_match", {})
        if match not in seen:
            seen.append(match)
            result.append({**chain, "filter_chain_match": match})
    return result


def _gateway_listener(listener: Json, proxy: ProxyNode) -> Json:
    port = listener["address"]["socket_address"]["port_value"]
    outside = [_address(*_split(text)) for number, text in proxy.extra_addresses if number == port]
    return {
        **{key: value for key, value in listener.items() if key != "bind_to_port"},
        "address": _address(proxy.pod_address, port),
        "additional_addresses": [{"address": address} for address in outside],
    }


def _split(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _without_unknown(value: Any) -> Any:
    """Without what holds messages of unknown types, and with secrets from the control plane."""
    if isinstance(value, list):
        return [_without_unknown(item) for item in value if not _is_unknown(item)]
    if isinstance(value, dict):
        kept = {
            key: _source(value) if key == "sds_config" else _without_unknown(item)
            for key, item in value.items()
            if not _is_unknown(item)
        }
        if "common_tls_context" in kept:
            kept["common_tls_context"] = _with_files(kept["common_tls_context"])
        return kept
    return value


def _source(secret: Json) -> Json:
    """Where a secret comes from. Those that a `credentialName` names may be missing, and hold nothing up."""
    return dict(ADS if secret.get("name") in (WORKLOAD_SECRET, TRUST_SECRET) else CREDENTIALS_ADS)


def _with_files(context: Json) -> Json:
    """A TLS context whose files, which Istio's agent would serve as secrets, are read by Envoy."""
    result = dict(context)
    found = context.get("tls_certificate_sds_secret_configs", [])
    named = [str(item.get("name", "")).removeprefix(_FILE_CERTIFICATE) for item in found]
    if found and all(str(item.get("name", "")).startswith(_FILE_CERTIFICATE) for item in found):
        del result["tls_certificate_sds_secret_configs"]
        pairs = [text.partition("~") for text in named]
        result["tls_certificates"] = [
            {"certificate_chain": {"filename": chain}, "private_key": {"filename": key}} for chain, _, key in pairs
        ]
    combined = context.get("combined_validation_context", context)
    roots = str(combined.get("validation_context_sds_secret_config", {}).get("name", ""))
    if roots.startswith(_FILE_ROOTS):
        path = roots.removeprefix(_FILE_ROOTS)
        result.pop("combined_validation_context", None)
        result.pop("validation_context_sds_secret_config", None)
        result["validation_context"] = {
            **combined.get("default_validation_context", {}),
            "trusted_ca": {"filename": SYSTEM_ROOTS if path == "system" else path},
        }
    return result


def _is_unknown(value: Any) -> bool:
    """Whether this is an unknown message, or an extension that is one."""
    if not isinstance(value, dict):
        return False
    return OPAQUE in value or (isinstance(value.get("typed_config"), dict) and OPAQUE in value["typed_config"])
