"""What single parts of Envoy's configuration mean: clusters, endpoints, TLS contexts, routes."""

from __future__ import annotations

from typing import Any, Literal

from mlmesh_local.envoy_types import Json

Side = Literal["ours", "theirs"]
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
# How a cluster finds its endpoints is compared by the endpoints; the rest names statistics and provenance.
SYSTEM_ROOTS = "/etc/ssl/certs/ca-certificates.crt"
_CLUSTER_DROPPED = (
    "alt_stat_name",
    "eds_cluster_config",
    "load_assignment",
    "name",
    "typed_extension_protocol_options",
)
_INBOUND_DROPPED = ("type", "lb_policy", "cleanup_interval", "upstream_bind_config", "connect_timeout")


def short(type_url: str) -> str:
    """The last word of a type."""
    return type_url.rpartition("/")[2].rpartition(".")[2]


def cluster_meaning(cluster: Json, side: Side) -> Json:
    """A cluster without names; protocol options and TLS as what they are."""
    inbound = cluster["name"].startswith("inbound|")
    dropped = (*_CLUSTER_DROPPED, *(_INBOUND_DROPPED if inbound else ()))
    result = {key: value for key, value in cluster.items() if key not in dropped}
    options = cluster.get("typed_extension_protocol_options", {}).get(_HTTP_OPTIONS)
    http = {key: value for key, value in (options or {}).items() if key != "@type"}
    if http.get("explicit_http_config") == {"http_protocol_options": {}}:
        # HTTP/1.1 is what a cluster without options speaks.
        del http["explicit_http_config"]
    if http:
        result["http"] = http
    if "circuit_breakers" in result:
        breakers = result["circuit_breakers"]
        # Statistics of what is left; Istio has them by an environment variable.
        thresholds = [{k: v for k, v in item.items() if k != "track_remaining"} for item in breakers["thresholds"]]
        result["circuit_breakers"] = {**breakers, "thresholds": thresholds}
    metadata = result.pop("metadata", {}).get("filter_metadata", {}).get("istio", {})
    about = {key: value for key, value in metadata.items() if key in ("config", "subset")}
    if about:
        result["about"] = about
    result["tls"] = {}
    if "transport_socket" in result:
        result["tls"]["always"] = tls_meaning(result.pop("transport_socket"), side)
    for match in result.pop("transport_socket_matches", []):
        key = "mesh" if match.get("match", {}).get("tlsMode") == "istio" else "other"
        result["tls"][key] = tls_meaning(match["transport_socket"], side)
    if result.get("common_lb_config") == {}:
        del result["common_lb_config"]
    panic = result.get("common_lb_config", {}).get("healthy_panic_threshold")
    if panic == {}:
        result["common_lb_config"] = {**result["common_lb_config"], "healthy_panic_threshold": {"value": 0}}
    return result


def tls_meaning(socket: Json | None, side: Side) -> Json | None:
    """A transport socket: None for plain bytes."""
    if socket is None or short(socket["typed_config"]["@type"]) == "RawBuffer":
        return None
    config = dict(socket["typed_config"])
    wrapped = []
    while "transport_socket" in config:
        wrapped.append({key: value for key, value in config.items() if key not in ("@type", "transport_socket")})
        config = dict(config["transport_socket"]["typed_config"])
    if short(config.get("@type", "")) == "RawBuffer":
        return {"wrapped": wrapped}
    common = config.pop("common_tls_context", {})
    server = short(config.get("@type", "")) == "DownstreamTlsContext"
    if config.get("require_client_certificate") is False:
        del config["require_client_certificate"]
    result: Json = {key: value for key, value in config.items() if key != "@type"}
    if wrapped:
        result["wrapped"] = wrapped
    result["alpn"] = common.get("alpn_protocols", [])
    params = dict(common.get("tls_params", {}))
    if params.get("tls_minimum_protocol_version") == "TLSv1_2":
        # Envoy's own least version; its highest one is 1.3 for servers, 1.2 for clients.
        del params["tls_minimum_protocol_version"]
    if server and params.get("tls_maximum_protocol_version") == "TLSv1_3":
        del params["tls_maximum_protocol_version"]
    result["params"] = params
    certificates = [_sds(item) for item in common.get("tls_certificate_sds_secret_configs", [])]
    certificates += [_file_certificate(item) for item in common.get("tls_certificates", [])]
    if certificates:
        result["certificates"] = certificates
    validation = _validation(common)
    if validation:
        result["validation"] = validation
    known = {
        "alpn_protocols",
        "tls_params",
        "tls_certificate_sds_secret_configs",
        "tls_certificates",
        "validation_context",
        "validation_context_sds_secret_config",
        "combined_validation_context",
    }
    result.update({key: value for key, value in common.items() if key not in known})
    return result


def _file_certificate(item: Json) -> Any:
    """Istio's agent serves files under names made of their paths."""
    files = [item.get(part, {}).get("filename") for part in ("certificate_chain", "private_key")]
    return f"file-cert:{files[0]}~{files[1]}" if all(files) else item


def _validation(common: Json) -> Json:
    """What is demanded of the peer's certificate; its names as texts, whether typed by kind of name or not."""
    validation = dict(common.get("validation_context", {}))
    if "validation_context_sds_secret_config" in common:
        validation["roots"] = _sds(common["validation_context_sds_secret_config"])
    combined = common.get("combined_validation_context")
    if combined:
        validation.update(combined.get("default_validation_context", {}))
        if "validation_context_sds_secret_config" in combined:
            validation["roots"] = _sds(combined["validation_context_sds_secret_config"])
    roots = validation.get("trusted_ca", {}).get("filename")
    if roots and "roots" not in validation:
        del validation["trusted_ca"]
        validation["roots"] = "file-root:" + ("system" if roots == SYSTEM_ROOTS else roots)
    names = [_matcher(item) for item in validation.pop("match_subject_alt_names", [])]
    typed = validation.pop("match_typed_subject_alt_names", [])
    names += [_matcher(item["matcher"]) for item in typed]
    if names:
        validation["names"] = sorted(set(names))
    return validation


def _matcher(matcher: Json) -> str:
    return " ".join(f"{key} {value}" for key, value in sorted(matcher.items()))


def _sds(config: Json) -> str:
    # Where secrets come from is the machine's affair: Istio's agent, or the control plane itself.
    return str(config.get("name"))


def endpoints_meaning(assignment: Json) -> Json:
    """Localities by priority, with their endpoints by address."""
    groups: Json = {}
    for group in assignment.get("endpoints", []):
        if not group.get("lb_endpoints"):
            continue
        locality = "/".join(
            str(group.get("locality", {}).get(part, "")) for part in ("region", "zone", "sub_zone")
        ).strip("/")
        key = f"{group.get('priority', 0)} {locality}".strip()
        endpoints = {}
        for item in group["lb_endpoints"]:
            address = item["endpoint"]["address"]
            socket = address.get("socket_address", {})
            place = f"{socket.get('address')}:{socket.get('port_value')}" if socket else str(address)
            mode = item.get("metadata", {}).get("filter_metadata", {}).get("envoy.transport_socket_match", {})
            endpoints[place] = {
                "weight": item.get("load_balancing_weight", 1),
                "tls": mode.get("tlsMode", ""),
                "health": item.get("health_status", "HEALTHY"),
            }
        groups[key] = {"weight": group.get("load_balancing_weight", 1), "endpoints": endpoints}
    for priority in {key.split(" ")[0] for key in groups}:
        alone = [group for key, group in groups.items() if key.split(" ")[0] == priority]
        if len(alone) == 1:
            # A weight counts among several only.
            alone[0].pop("weight")
    policy = assignment.get("policy")
    return {"groups": groups, **({"policy": policy} if policy else {})}


def route_meaning(route: Json, _side: Side) -> Json:
    """A route; filters' settings by the type of the settings."""
    route = _fractions(route)
    result = {key: value for key, value in route.items() if key not in ("metadata", "typed_per_filter_config")}
    match = dict(result.get("match", {}))
    if match.get("case_sensitive") is True:
        del match["case_sensitive"]
    result["match"] = match
    config = route.get("metadata", {}).get("filter_metadata", {}).get("istio", {}).get("config")
    if config:
        result["config"] = config
    settings = route.get("typed_per_filter_config", {})
    if settings:
        result["filters"] = _by_type(settings)
    action = result.get("route")
    if action:
        result["route"] = _action(action)
    return result


def tracing_meaning(manager: Json, route: Json) -> Json:
    """What is traced of the calls of a route: its own settings before those of its listener."""
    shares = {}
    for share in ("client_sampling", "random_sampling", "overall_sampling"):
        value = route.get(share, manager.get(share))
        if value is not None:
            shares[share] = percent(value)
    tags = {item["tag"]: item for item in (*manager.get("custom_tags", []), *route.get("custom_tags", []))}
    return {**shares, "custom_tags": tags}


def percent(value: Json) -> float:
    """Of a Percent or a FractionalPercent."""
    if "value" in value or not value:
        return float(value.get("value", 0.0))
    of = {"TEN_THOUSAND": 10_000, "MILLION": 1_000_000}.get(value.get("denominator", ""), 100)
    return float(value.get("numerator", 0)) * 100 / of


def _action(action: Json) -> Json:
    result = dict(action)
    retries = result.get("retry_policy", {})
    if "retry_on" in retries:
        # Istio leaves empty ones where it takes conditions out.
        result["retry_policy"] = {**retries, "retry_on": sorted(set(retries["retry_on"].split(",")) - {""})}
    weighted = result.get("weighted_clusters")
    if weighted:
        clusters = []
        for item in weighted["clusters"]:
            entry = {key: value for key, value in item.items() if key != "typed_per_filter_config"}
            if "typed_per_filter_config" in item:
                entry["filters"] = _by_type(item["typed_per_filter_config"])
            clusters.append(entry)
        result["weighted_clusters"] = {**weighted, "clusters": clusters}
        # The sum is what it is without being said.
        result["weighted_clusters"].pop("total_weight", None)
    return result


def _fractions(value: Any) -> Any:
    """Shares as percentages, whatever they are written in."""
    if isinstance(value, list):
        return [_fractions(item) for item in value]
    if isinstance(value, dict):
        if value and set(value) <= {"numerator", "denominator"}:
            return {"percent": percent(value)}
        # A share of nothing at all is written as an empty message.
        empty = {key: {"percent": 0.0} for key in ("percentage", "default_value") if value.get(key) == {}}
        return {key: empty.get(key) or _fractions(item) for key, item in value.items()}
    return value


def _by_type(settings: Json) -> Json:
    return {short(str(v.get("@type", k))): {a: b for a, b in v.items() if a != "@type"} for k, v in settings.items()}


def plain(value: Any) -> Any:
    """The value for a message: short."""
    text = str(value)
    return text if len(text) < 400 else text[:400] + "…"
