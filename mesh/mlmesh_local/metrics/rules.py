"""Counts calls by the rule that routed them, as the calling proxies report them when they end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlmesh_local.metrics.calls import HttpCall, Routed
from mlmesh_local.stats import Counts, Window

KEYS_MAX = 5_000
"""Most combinations of rule, destination and host that are told apart; hosts are what callers write."""
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rule stands: in `spec.http` of its VirtualService, and of the delegate that it came from."""

    rule: int
    delegate: str = ""
    delegate_rule: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent where, by which rule.

    Attributes:
        virtual_service: "namespace/name"; empty for the default route of a service.
        place: which rule; None where the control plane does not tell (Istio's own).
        name: Envoy's name of the route.
        host, subset: the destination; empty where the rule answered by itself.
        authority: host that was asked for, without its port; empty beyond `KEYS_MAX`.
    """

    virtual_service: str
    place: Place | None
    name: str
    host: str
    subset: str
    authority: str


class RuleCounts:
    """Counts since the mesh was ready. ``clock`` gives monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._window: Window[tuple[Routed, str, str]] = Window()
        self._begin_ns = 0

    def begin(self, now_ns: int) -> None:
        """Forget what was counted; calls that began before ``now_ns`` (since 1970) are not counted any more."""
        self._begin_ns = now_ns
        self._window.begin(self._clock())

    def take(self, call: HttpCall) -> None:
        """Count a call that ended."""
        if call.route is None or not call.ended or call.stream[0] < self._begin_ns:
            return
        failed = call.grpc_status != 0 if call.grpc else call.code == 0 or call.code >= _SERVER_ERROR
        key = (call.route, call.peers.cluster, call.authority)
        if key not in self._window and len(self._window) >= KEYS_MAX:
            key = (call.route, call.peers.cluster, "")
        self._window.add(key, Counts(requests=1, failures=int(failed)))

    def sample(self) -> None:
        """Remember the counts of now; call it every second or so."""
        self._window.sample(self._clock())

    def observed(self, window_s: float) -> Mapping[Sent, Counts]:
        """Counts of the last ``window_s`` seconds."""
        found: dict[Sent, Counts] = {}
        for (route, cluster, authority), counts in self._window.observed(self._clock(), window_s).items():
            _, _, subset, host = f"{cluster}|||".split("|")[:4] if cluster.startswith("outbound|") else ("", "", "", "")
            sent = Sent(
                virtual_service=_virtual_service(route.resource),
                place=_place(route.rule),
                name=route.name,
                host=host,
                subset=subset,
                authority=authority.rpartition(":")[0] if authority.rpartition(":")[2].isdigit() else authority,
            )
            found[sent] = found.get(sent, Counts()) + counts
        return found


def _virtual_service(resource: str) -> str:
    """From ".../namespaces/NAMESPACE/virtual-service/NAME"."""
    parts = resource.split("/")
    return f"{parts[-3]}/{parts[-1]}" if parts[-2:-1] == ["virtual-service"] and len(parts) > 3 else ""


def _place(text: str) -> Place | None:
    if not text:
        return None
    found = json.loads(text)
    return Place(
        rule=int(found.get("rule", 0)),
        delegate=found.get("delegate", ""),
        delegate_rule=int(found.get("delegate_rule", 0)),
    )
