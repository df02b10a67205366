"""Who such a client is: the node of its bootstrap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlmesh_local.resources.problems import did_you_mean
from mlmesh_runtime.errors import InvalidInput

PREFIX = "proxyless"
TOKEN_FIELD = "MLMESH_TOKEN"  # noqa: S105  (a name)
LABELS_FIELD = "LABELS"
TOLERATED_FIELD = "MLMESH_TOLERATED"

TOLERABLE = (
    "connectionPool",
    "corsPolicy",
    "headers",
    "loadBalancer",
    "mirror",
    "outlierDetection",
    "retries",
    "rewrite",
    "timeout",
)
"""Fields of Istio that a client may declare to work without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxylessNode:
    """One client process.

    ``id`` is "proxyless~{namespace}~{service account}~{anything}": the token proves it, and so its identity.
    ``tolerated`` are fields (of `TOLERABLE`) that it does without rather than be refused.
    """

    id: str
    namespace: str
    service_account: str
    labels: Mapping[str, str]
    tolerated: frozenset[str] = frozenset()
    token: str = field(default="", repr=False, compare=False)

    @classmethod
    def of_bootstrap(cls, node_id: str, metadata: Mapping[str, Any]) -> ProxylessNode | None:
        """The node that a bootstrap describes; None where it is not one of ours."""
        parts = node_id.split("~")
        if len(parts) != 4 or parts[0] != PREFIX:
            return None
        labels = metadata.get(LABELS_FIELD)
        tolerated = metadata.get(TOLERATED_FIELD)
        return cls(
            id=node_id,
            namespace=parts[1],
            service_account=parts[2],
            labels={str(k): str(v) for k, v in labels.items()} if isinstance(labels, Mapping) else {},
            tolerated=frozenset(map(str, tolerated)) if isinstance(tolerated, list) else frozenset(),
            token=str(metadata.get(TOKEN_FIELD, "")),
        )


def tolerated_fields(names: Iterable[str]) -> frozenset[str]:
    """Fields that a client declares to do without. Raises InvalidInput for one that it cannot."""
    found = frozenset(names)
    for name in sorted(found - set(TOLERABLE)):
        hint = did_you_mean(name, TOLERABLE)
        raise InvalidInput(
            f"a client cannot do without {name!r}{hint}; it may without: {', '.join(TOLERABLE)}", field="tolerated"
        )
    return found


def node_id(namespace: str, service_account: str, name: str) -> str:
    """The id of a client of a ServiceAccount."""
    return "~".join((PREFIX, namespace, service_account, name))
