"""What to send on one state-of-the-world ADS stream: what gRPC clients speak, and Envoys that are told to.

The order is that of `delta`: make before break. Clusters and listeners are always sent as a whole, so what is to go
away later is sent along until then; of the other types only what changed is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_local.delta import WILDCARDS, Response, Stream
from mlmesh_local.envoy_types import CLUSTER, PUSH_ORDER
from mlmesh_local.packing import Named, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRequest:
    """A DiscoveryRequest, as far as it matters: ``names`` is all that is wanted now; none of them means everything."""

    type_url: str
    names: tuple[str, ...] = ()
    nonce: str = ""
    error: str = ""


@dataclass(slots=True)
class _Subscription:
    names: tuple[str, ...] = ()
    sent: dict[str, Packed] = field(default_factory=dict)
    under_way: Response | None = None
    answered: bool = False
    last_nonce: str = ""


class WholeStream(Stream):
    """State of one state-of-the-world stream."""

    def __init__(self) -> None:
        super().__init__()
        self._subscriptions: dict[str, _Subscription] = {}

    def receive(self, request: WholeRequest) -> None:
        """Take a request: an acknowledgement, a refusal, a change of subscriptions, or several of these."""
        if request.type_url not in PUSH_ORDER:
            return
        subscription = self._subscriptions.setdefault(request.type_url, _Subscription())
        if request.nonce and request.nonce != subscription.last_nonce:
            # Sent before our last response had arrived; the answer to that one says all of it again.
            return
        under_way = subscription.under_way
        if under_way is not None and request.nonce == under_way.nonce:
            subscription.under_way = None
            if request.error:
                for packed in under_way.resources:
                    subscription.sent.pop(packed.name, None)
                self.note_rejection(under_way, request.error)
        more = set(request.names) - set(subscription.names)
        subscription.names = request.names
        if more and request.type_url in WILDCARDS:
            subscription.answered = False
        if request.names or request.type_url not in WILDCARDS:
            for name in subscription.sent.keys() - set(request.names):
                del subscription.sent[name]

    def busy(self, *types: str) -> bool:
        """Whether a response of one of these types waits for its acknowledgement."""
        return any(s is not None and s.under_way for s in map(self._subscriptions.get, types))

    def complete(self, type_url: str) -> bool:
        """Whether the client has everything of a type that it asked for and that there is."""
        subscription = self._subscriptions.get(type_url)
        if subscription is None:
            return True
        wanted = self._wanted(type_url, subscription, self.desired(type_url))
        return all(
            name in subscription.sent and subscription.sent[name].version == p.version for name, p in wanted.items()
        )

    def acknowledged(self, type_url: str) -> Mapping[str, str]:
        """Versions that the client has taken, by name."""
        subscription = self._subscriptions.get(type_url)
        if subscription is None:
            return {}
        under_way = {packed.name for packed in subscription.under_way.resources} if subscription.under_way else set()
        return {name: packed.version for name, packed in subscription.sent.items() if name not in under_way}

    def stale_clusters(self) -> bool:
        """Whether the client still has clusters that should go away."""
        subscription = self._subscriptions.get(CLUSTER)
        desired = self.desired(CLUSTER)
        return subscription is not None and any(desired.get(name) is None for name in subscription.sent)

    def _wanted(self, type_url: str, subscription: _Subscription, desired: Named) -> dict[str, Packed]:
        if type_url in WILDCARDS and not subscription.names:
            return dict(desired)
        found = ((name, desired.get(name)) for name in subscription.names)
        return {name: packed for name, packed in found if packed is not None}

    def push(self, type_url: str, responses: list[Response], *, removals: bool = False) -> None:
        """Send what changed of a type, if nothing of it is under way."""
        subscription = self._subscriptions.get(type_url)
        if subscription is None or subscription.under_way is not None:
            return
        wanted = self._wanted(type_url, subscription, self.desired(type_url))
        changed = {
            name: packed
            for name, packed in wanted.items()
            if name not in subscription.sent or subscription.sent[name].version != packed.version
        }
        whole = type_url in WILDCARDS
        gone = subscription.sent.keys() - wanted.keys() if whole else set()
        late = gone if type_url == CLUSTER and not removals else set()
        if not changed and gone == late and (subscription.answered or not whole):
            return
        kept = {name: subscription.sent[name] for name in late}
        content = {**wanted, **kept} if whole else changed
        subscription.answered = True
        subscription.sent = content if whole else {**subscription.sent, **changed}
        response = self.response(type_url, tuple(content[name] for name in sorted(content)))
        subscription.under_way = response
        subscription.last_nonce = response.nonce
        responses.append(response)
