"""Policies, Sidecars and Telemetries: what selects nothing, what selects the same, and EnvoyFilters."""

from __future__ import annotations

from typing import Any

from mlmesh_local.resources.analysis.cluster import Cluster, Item, listed, mapped, selector_text

ROOT_NAMESPACE = "istio-system"
_GATEWAY_LABEL = "gateway.networking.k8s.io/gateway-name"
_RELATIVE = ("REMOVE", "REPLACE", "INSERT_BEFORE", "INSERT_AFTER")


def analyze_policies(cluster: Cluster) -> None:
    """Look at all of them."""
    for item in cluster.items("AuthorizationPolicy"):
        _authorization(cluster, item)
    for kind in ("AuthorizationPolicy", "RequestAuthentication", "Telemetry"):
        for item in cluster.items(kind):
            _ineffective(cluster, item)
    _scoped(cluster, "Sidecar", "workloadSelector", "labels", ("IST0110", "IST0111"))
    _scoped(cluster, "Telemetry", "selector", "matchLabels", ("IST0159", "IST0160"))
    _telemetry(cluster)
    _filters(cluster)
    for item in cluster.items("Sidecar"):
        if mapped(item.spec.get("outboundTrafficPolicy")).get("egressProxy") is not None:
            place = ("spec", "outboundTrafficPolicy", "egressProxy")
            cluster.report("IST0002", item, '"egressProxy" is deprecated', *place, offline=True)


def _authorization(cluster: Cluster, item: Item) -> None:
    selector = item.spec.get("selector")
    labels = mapped(mapped(selector).get("matchLabels"))
    everywhere = item.namespace == ROOT_NAMESPACE
    if not (everywhere and selector is None) and not cluster.selected(labels, "" if everywhere else item.namespace):
        what = f'has the labels "{selector_text(labels)}"' if labels else f'is in the namespace "{item.namespace}"'
        cluster.report("IST0127", item, f"no workload {what}", "spec", "selector")
    known = [space.meta.name for space in cluster.items("Namespace")]
    for index, rule in enumerate(listed(item.spec.get("rules"))):
        for number, origin in enumerate(listed(mapped(rule).get("from"))):
            source = mapped(mapped(origin).get("source"))
            for name in ("namespaces", "notNamespaces"):
                for pattern in listed(source.get(name)):
                    if not any(_fits(pattern, space) for space in known):
                        path = ("spec", "rules", index, "from", number, "source", name)
                        cluster.report("IST0101", item, f'there is no namespace "{pattern}"', *path)


def _fits(pattern: str, name: str) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("*"):
        return name.endswith(pattern[1:])
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name.lower() == pattern.lower()


def _ineffective(cluster: Cluster, item: Item) -> None:
    if item.spec.get("targetRef") is not None or item.spec.get("selector") is None:
        return
    labels = mapped(mapped(item.spec.get("selector")).get("matchLabels"))
    for pod in cluster.selected(labels, item.namespace):
        if _GATEWAY_LABEL in pod.labels:
            text = (
                f'the proxy of the Gateway "{pod.labels[_GATEWAY_LABEL]}" takes policies by targetRefs, not by selector'
            )
            cluster.report("IST0166", item, text, "spec", "selector")
            return


def _scoped(cluster: Cluster, kind: str, field: str, inner: str, codes: tuple[str, str]) -> None:
    """What selects no workload, several that select one workload, several without selector in one namespace."""
    by_pod: dict[tuple[str, str], list[Item]] = {}
    without: dict[str, list[Item]] = {}
    for item in cluster.items(kind):
        labels = mapped(mapped(item.spec.get(field)).get(inner))
        if not labels:
            if kind == "Sidecar" or item.spec.get(field) is None:
                without.setdefault(item.namespace, []).append(item)
            continue
        pods = cluster.selected(labels, item.namespace)
        if not pods:
            text = f'no workload has the labels "{selector_text(labels)}"'
            cluster.report("IST0101", item, text, "spec", field)
        for pod in pods:
            by_pod.setdefault((pod.namespace, pod.name), []).append(item)
    for (_, pod_name), items in by_pod.items():
        if len(items) > 1:
            names = ", ".join(item.meta.name for item in items)
            for item in items:
                cluster.report(codes[0], item, f"{names} select the same workload, {pod_name}", "spec", field)
    for namespace, items in without.items():
        if len(items) > 1:
            names = ", ".join(item.meta.name for item in items)
            for item in items:
                text = f"{names} have no selector in one namespace, {namespace}"
                cluster.report(codes[1], item, text, offline=kind == "Telemetry")


def _telemetry(cluster: Cluster) -> None:
    for item in cluster.items("Telemetry"):
        if _default_access_logging(cluster):
            continue
        for index, log in enumerate(listed(item.spec.get("accessLogging"))):
            if not mapped(log).get("disabled") and not mapped(log).get("providers"):
                text = "access logging without a provider does nothing: the mesh has no default provider"
                cluster.report("IST0157", item, text, "spec", "accessLogging", index, offline=True)


def _default_access_logging(cluster: Cluster) -> bool:
    for item in cluster.items("ConfigMap"):
        text = str(mapped(item.plain.get("data")).get("mesh", ""))
        import yaml  # noqa: PLC0415  Only a mesh with settings needs it.

        settings = yaml.safe_load(text) or {}
        return bool(mapped(mapped(settings).get("defaultProviders")).get("accessLogging"))
    return False


# EnvoyFilters


def _filters(cluster: Cluster) -> None:
    versioned: list[str] = []
    for item in cluster.items("EnvoyFilter"):
        for index, patch in enumerate(listed(item.spec.get("configPatches"))):
            change = mapped(mapped(patch).get("patch"))
            if not change:
                break
            name = _filter_name(mapped(patch))
            _patch(cluster, item, index, mapped(patch), again=name in versioned)
            if mapped(mapped(mapped(patch).get("match")).get("proxy")).get("proxyVersion"):
                versioned.append(name)


def _filter_name(patch: Any) -> str:
    value = mapped(mapped(patch.get("patch")).get("value"))
    if "name" in value:
        return str(value["name"])
    chain = mapped(mapped(mapped(patch.get("match")).get("listener")).get("filterChain"))
    return str(mapped(chain.get("filter")).get("name", "")) if value else ""


def _patch(cluster: Cluster, item: Item, index: int, patch: Any, *, again: bool) -> None:
    operation = mapped(patch.get("patch")).get("operation", "")
    target = patch.get("applyTo", "")
    place = ("spec", "configPatches", index)
    whole = target in {"ROUTE_CONFIGURATION", "HTTP_ROUTE"}
    if operation == "ADD" and whole:
        cluster.report("IST0153", item, f"ADD is ignored for {target}", *place, offline=True)
    elif operation == "REMOVE" and whole:
        cluster.report("IST0154", item, f"REMOVE is ignored for {target}", *place, offline=True)
    elif operation == "REPLACE" and target not in {"NETWORK_FILTER", "HTTP_FILTER", "VIRTUAL_HOST"}:
        text = f"REPLACE is for HTTP_FILTER, NETWORK_FILTER and VIRTUAL_HOST, not {target}"
        cluster.report("IST0152", item, text, *place, offline=True)
    elif operation in _RELATIVE and not item.spec.get("priority"):
        code = "IST0155" if again else "IST0151"
        text = f"{operation} depends on what was patched before: set a priority, or use INSERT_FIRST or ADD"
        cluster.report(code, item, text, *place, offline=True)
