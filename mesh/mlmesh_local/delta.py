"""What to send on one delta ADS stream, decided without I/O.

Order is make-before-break: clusters, endpoints, secrets, then configurations of filters, then listeners, then routes,
and only then are clusters taken away. Envoy acknowledges changed clusters once they are warm, which needs their
endpoints and secrets, so those follow at once; the rest waits for the acknowledgement. One response of a type is under
way at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, PUSH_ORDER, ROUTES, SECRET
from mlmesh_local.packing import Named, Packed
from mlmesh_local.snapshot import Snapshot

WILDCARDS = frozenset({CLUSTER, LISTENER})
"""Types of which Envoy wants all there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A DeltaDiscoveryRequest, as far as it matters. ``error`` is Envoy's text when it refuses the nonce's response."""

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    known: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A DeltaDiscoveryResponse to be."""

    type_url: str
    nonce: str
    resources: tuple[Packed, ...]
    removed: tuple[str, ...]
    generation: int
    """Which snapshot, or which secrets, it came from."""


@dataclass(slots=True)
class _Subscription:
    """One type on one stream. ``sent`` is what Envoy has, or will have when it acknowledges."""

    names: set[str] = field(default_factory=set)
    sent: dict[str, str] = field(default_factory=dict)
    under_way: Response | None = None
    answered: bool = False
    sent_all_of: Named | None = None
    """Resources of which nothing is left to send; they are compared by identity, so an equal push costs nothing."""
    complete_for: tuple[Named, Iterable[str]] | None = None
    """Resources and needed names that were found to be there."""

    def forget_checks(self) -> None:
        """What is wanted, or what Envoy has, is no longer what it was."""
        self.sent_all_of = self.complete_for = None


class Stream(ABC):
    """What delta and state-of-the-world streams have in common: what is wanted, in which order it goes, refusals."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._secrets: Named = {}
        self._count = 0
        self._generations = {SECRET: 0, CLUSTER: 0}
        self._rejected_type = ""
        self.rejection = ""
        """Envoy's text about the snapshot, or about secrets; nothing more of it is sent."""

    def set_snapshot(self, snapshot: Snapshot) -> None:
        """What Envoy shall run. A rejection of the one before is over."""
        self._snapshot = snapshot
        self._generations[CLUSTER] += 1
        self.rejection = self._rejected_type = ""

    def set_secrets(self, secrets: Named) -> None:
        """Secrets of this Envoy, by SDS name."""
        self._secrets = secrets
        self._generations[SECRET] += 1
        if self._rejected_type == SECRET:
            self.rejection = self._rejected_type = ""

    def poll(self) -> list[Response]:
        """Responses to send now."""
        responses: list[Response] = []
        if self._snapshot is None:
            return responses
        if self.rejection:
            # The last good configuration stays, and its certificates are still rotated.
            if self._rejected_type != SECRET:
                self.push(SECRET, responses)
            return responses
        for type_url in (CLUSTER, ENDPOINTS, SECRET):
            self.push(type_url, responses)
        if self.busy(CLUSTER, ENDPOINTS, SECRET):
            return responses
        # A listener asks for filters that are new with it only once it is there itself.
        self.push(EXTENSIONS, responses)
        if not self.busy(EXTENSIONS):
            self.push(LISTENER, responses)
        if not self.busy(EXTENSIONS, LISTENER):
            self.push(ROUTES, responses)
        if self._settled(ENDPOINTS, SECRET, EXTENSIONS, LISTENER, ROUTES):
            self.push(CLUSTER, responses, removals=True)
        return responses

    @property
    def acked_version(self) -> str:
        """Version of the snapshot if Envoy has acknowledged all of it, else empty."""
        if self._snapshot is None or self.rejection:
            return ""
        return self._snapshot.version if self._settled(*PUSH_ORDER) and not self.stale_clusters() else ""

    def _settled(self, *types: str) -> bool:
        return not self.busy(*types) and all(self.complete(type_url) for type_url in types)

    def desired(self, type_url: str) -> Named:
        """What there is of a type."""
        if type_url == SECRET:
            return self._secrets
        return self._snapshot.resources.get(type_url, {}) if self._snapshot else {}

    def response(self, type_url: str, resources: tuple[Packed, ...], removed: tuple[str, ...] = ()) -> Response:
        """A response with a nonce of its own."""
        self._count += 1
        return Response(
            type_url=type_url,
            nonce=str(self._count),
            resources=resources,
            removed=removed,
            generation=self._generation(type_url),
        )

    def note_rejection(self, response: Response, error: str) -> None:
        """Envoy refused a response. Of what has been replaced since, that says nothing about what is there now."""
        if response.generation == self._generation(response.type_url):
            self.rejection, self._rejected_type = error, response.type_url

    def _generation(self, type_url: str) -> int:
        return self._generations[SECRET if type_url == SECRET else CLUSTER]

    @abstractmethod
    def busy(self, *types: str) -> bool:
        """Whether a response of one of these types waits for its acknowledgement."""

    @abstractmethod
    def complete(self, type_url: str) -> bool:
        """Whether Envoy has everything of a type that it needs."""

    @abstractmethod
    def acknowledged(self, type_url: str) -> Mapping[str, str]:
        """Versions that Envoy has taken, by name."""

    @abstractmethod
    def stale_clusters(self) -> bool:
        """Whether Envoy still has clusters that should go away."""

    @abstractmethod
    def push(self, type_url: str, responses: list[Response], *, removals: bool = False) -> None:
        """Send what changed of a type, if nothing of it is under way."""


class DeltaStream(Stream):
    """State of one stream to one Envoy."""

    def __init__(self) -> None:
        super().__init__()
        self._subscriptions: dict[str, _Subscription] = {}

    def receive(self, request: Request) -> None:
        """Take a request: an acknowledgement, a refusal, a change of subscriptions, or several of these."""
        if request.type_url not in PUSH_ORDER:
            return
        first = request.type_url not in self._subscriptions
        subscription = self._subscriptions.setdefault(request.type_url, _Subscription())
        under_way = subscription.under_way
        if under_way is not None and request.nonce == under_way.nonce:
            subscription.under_way = None
            if request.error:
                self._rejected(subscription, under_way, request.error)
        if request.subscribe or request.unsubscribe or first:
            subscription.forget_checks()
        if first:
            # After a reconnection Envoy tells what it has; it is not sent again.
            subscription.sent = dict(request.known)
            subscription.answered = bool(request.known)
        subscription.names.update(request.subscribe)
        if not first:
            # Subscribing again asks for the resource again.
            for name in request.subscribe:
                subscription.sent.pop(name, None)
        for name in request.unsubscribe:
            subscription.names.discard(name)
            subscription.sent.pop(name, None)

    def _rejected(self, subscription: _Subscription, response: Response, error: str) -> None:
        # Envoy may have taken some of the resources: what it has is unknown, so they will be sent again.
        for packed in response.resources:
            subscription.sent.pop(packed.name, None)
        subscription.forget_checks()
        self.note_rejection(response, error)

    def busy(self, *types: str) -> bool:
        """Whether a response of one of these types waits for its acknowledgement."""
        return any(s is not None and s.under_way for s in map(self._subscriptions.get, types))

    def complete(self, type_url: str) -> bool:
        """Whether Envoy has everything of a type that the snapshot needs."""
        subscription = self._subscriptions.get(type_url)
        desired = self.desired(type_url)
        needed = self._needed(type_url)
        if subscription is None:
            return not needed
        checked = subscription.complete_for
        if checked is not None and checked[0] is desired and checked[1] is needed:
            return True
        complete = all(subscription.sent.get(name) == desired[name].version for name in needed)
        subscription.complete_for = (desired, needed) if complete else None
        return complete

    def _needed(self, type_url: str) -> Iterable[str]:
        snapshot = self._snapshot
        if snapshot is None:
            return ()
        if type_url == ENDPOINTS:
            return snapshot.endpoint_names
        if type_url == ROUTES:
            return snapshot.route_names
        if type_url == EXTENSIONS:
            return snapshot.extension_names
        if type_url == SECRET:
            return snapshot.secret_names & self._secrets.keys()
        return self.desired(type_url)

    def acknowledged(self, type_url: str) -> Mapping[str, str]:
        """Versions that Envoy has taken, by name."""
        subscription = self._subscriptions.get(type_url)
        if subscription is None:
            return {}
        waiting = subscription.under_way.resources if subscription.under_way else ()
        under_way = {packed.name for packed in waiting}
        return {name: version for name, version in subscription.sent.items() if name not in under_way}

    def stale_clusters(self) -> bool:
        """Whether Envoy still has clusters that should go away."""
        subscription = self._subscriptions.get(CLUSTER)
        return subscription is not None and not subscription.sent.keys() <= self.desired(CLUSTER).keys()

    def push(self, type_url: str, responses: list[Response], *, removals: bool = False) -> None:
        """Send what changed of a type, if nothing of it is under way."""
        subscription = self._subscriptions.get(type_url)
        if subscription is None or subscription.under_way is not None:
            return
        desired = self.desired(type_url)
        if subscription.sent_all_of is desired:
            return
        wanted = desired.keys() if type_url in WILDCARDS else desired.keys() & subscription.names
        changed = tuple(
            desired[name] for name in sorted(wanted) if subscription.sent.get(name) != desired[name].version
        )
        removed: tuple[str, ...] = ()
        if type_url == LISTENER or removals:
            removed = tuple(sorted(subscription.sent.keys() - desired.keys()))
        # Envoy does not become ready before it has heard of every wildcard type once, be it that there is nothing.
        if not changed and not removed and (subscription.answered or type_url not in WILDCARDS):
            if type_url not in WILDCARDS or subscription.sent.keys() <= desired.keys():
                subscription.sent_all_of = desired
            return
        subscription.answered = True
        response = self.response(type_url, changed, removed)
        subscription.under_way = response
        # The same resources may come back later: what was found for them was about what was there then.
        subscription.forget_checks()
        for packed in changed:
            subscription.sent[packed.name] = packed.version
        for name in removed:
            subscription.sent.pop(name, None)
        responses.append(response)
