"""Gateways and routes of the Gateway API whose status would say that something is wrong."""

from __future__ import annotations

from mlmesh_local.resources.analysis.cluster import Cluster

_TOLD = ("Accepted", "Programmed", "ResolvedRefs")


def analyze_conditions(cluster: Cluster) -> None:
    """Look at all of them."""
    for kind in ("KubernetesGateway", "HTTPRoute", "GRPCRoute"):
        for item in cluster.items(kind):
            status = cluster.status(item)
            conditions = list(status.get("conditions", []))
            for parent in status.get("parents", []):
                conditions += parent["conditions"]
            for condition in conditions:
                if condition["type"] in _TOLD and condition["status"] == "False":
                    text = f"{condition['type']} is False ({condition['reason']}): {condition['message']}"
                    cluster.report("IST0171", item, text)
