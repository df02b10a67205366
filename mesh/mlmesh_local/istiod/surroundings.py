"""What a laptop adds to the resources that Istio reads: where traces go, and the mesh's trust domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import yaml

from mlmesh_local.istiod.objects import FIRST_TIME, ROOT_NAMESPACE
from mlmesh_local.istiod.store import Object
from mlmesh_local.model import World

COLLECTOR_HOST: Final = "collector.laptop.internal"
PROVIDER: Final = "laptop"


def with_surroundings(documents: Sequence[Object], world: World) -> list[Object]:
    """Documents with the settings and the entry that the laptop's trace collector needs."""
    result: list[Object] = []
    found = False
    for document in documents:
        if _is_mesh_config(document):
            found = True
            result.append(_configured(document, world))
        else:
            result.append(document)
    if not found:
        metadata = {"name": "istio", "namespace": ROOT_NAMESPACE, "creationTimestamp": FIRST_TIME}
        empty = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"mesh": ""}}
        result.append(_configured(empty, world))
    if world.otlp_address:
        result.append(_collector(world.otlp_address))
    return result


def _is_mesh_config(document: Object) -> bool:
    metadata = document.get("metadata", {})
    place = (document.get("kind"), metadata.get("namespace"), metadata.get("name"))
    return place == ("ConfigMap", ROOT_NAMESPACE, "istio")


def _configured(document: Object, world: World) -> Object:
    settings: dict[str, Any] = yaml.safe_load(document["data"].get("mesh") or "") or {}
    settings.setdefault("trustDomain", world.trust_domain)
    if world.otlp_address:
        port = int(world.otlp_address.rpartition(":")[2])
        provider = {"name": PROVIDER, "opentelemetry": {"service": COLLECTOR_HOST, "port": port}}
        settings["extensionProviders"] = [*settings.get("extensionProviders", []), provider]
        settings["defaultProviders"] = {"tracing": [PROVIDER], **settings.get("defaultProviders", {})}
    return {**document, "data": {**document["data"], "mesh": yaml.safe_dump(settings)}}


def _collector(address: str) -> Object:
    host, _, port = address.rpartition(":")
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": "laptop-collector", "namespace": ROOT_NAMESPACE, "creationTimestamp": FIRST_TIME},
        "spec": {
            "hosts": [COLLECTOR_HOST],
            "location": "MESH_EXTERNAL",
            "resolution": "STATIC",
            "ports": [{"number": int(port), "name": "grpc", "protocol": "GRPC"}],
            "endpoints": [{"address": host}],
        },
    }
