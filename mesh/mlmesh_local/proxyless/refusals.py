"""What a client is refused, and how it comes to see why.

gRPC shows the name of an endpoints resource that has no endpoints in the status of the calls that wanted it. So a
refused route leads to a cluster whose endpoints are named by the reason; clusters of that name are made on demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.translate.names import ADS

CLUSTER_PREFIX = "refused|"
TEXT_CHARACTERS_MAX = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One thing that a client without a sidecar cannot do.

    ``where`` is the resource ("VirtualService mlmesh/server http[0]"), ``field`` Istio's field, ``why`` a phrase.
    """

    where: str
    field: str
    why: str

    @property
    def root(self) -> str:
        """The field by which it may be tolerated."""
        return self.field.partition(".")[0]

    @property
    def text(self) -> str:
        """For the status of calls and for people."""
        return f"{self.where}: {self.field}: {self.why}"[:TEXT_CHARACTERS_MAX]


def refused_cluster(refusals: list[Refusal]) -> str:
    """Name of the cluster that refused calls go to."""
    return f"{CLUSTER_PREFIX}refused without a sidecar: {'; '.join(dict.fromkeys(r.text for r in refusals))}"


def refusing(name: str) -> Json:
    """The cluster of such a name."""
    return {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS, "service_name": name.removeprefix(CLUSTER_PREFIX)},
        "lb_policy": "ROUND_ROBIN",
    }


def provenance(value: Mapping[str, Json], fallback: str) -> str:
    """Which resource made a route or a cluster, by the metadata that Istio gives it."""
    metadata = value.get("metadata", {}).get("filter_metadata", {})
    path = str(metadata.get("istio", {}).get("config", ""))
    rule = metadata.get("mlmesh", {}).get("rule")
    parts = path.strip("/").split("/")
    if len(parts) < 3:
        return fallback
    kinds = {"virtual-service": "VirtualService", "destination-rule": "DestinationRule", "http-route": "HTTPRoute"}
    where = f"{kinds.get(parts[-2], parts[-2])} {parts[-3]}/{parts[-1]}"
    return f"{where} http[{int(rule)}]" if rule is not None else where
