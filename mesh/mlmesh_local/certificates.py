"""Which certificate each Envoy holds, and when it gets the next one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mlmesh_local.model import (
    TRUST_SECRET,
    WORKLOAD_SECRET,
    CertificateSecret,
    ProxyNode,
    Secret,
    TrustSecret,
)
from mlmesh_local.pki import Authority, Certificate, Clock
from mlmesh_local.svids import ForeignIssuer
from mlmesh_local.translate import credential_secret, root_secret
from mlmesh_runtime.errors import WrongState

logger = logging.getLogger(__name__)

CHECK_S = 30.0


class Sink(Protocol):
    """Where secrets go: the ADS server."""

    def set_secrets(self, node_id: str, secrets: Mapping[str, Secret]) -> None:
        """Replace a node's secrets; connected Envoys get what changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCredential:
    """A certificate that a gateway shows to the outside: its ``credentialName`` and the names that are in it."""

    name: str
    hosts: tuple[str, ...]
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RootBundle:
    """Roots (PEM) under an SDS name, for certain clients or servers; empty are the authority's own."""

    name: str
    roots: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A certificate chain with its key (PEM) under an SDS name, as a Secret has them."""

    name: str
    certificate: str
    key: str = field(repr=False)


Bundle = RootBundle | KeyPair


@dataclass(slots=True)
class _Held:
    proxy: ProxyNode
    credentials: tuple[ServerCredential, ...]
    bundles: tuple[Bundle, ...]
    trust_domain: str
    leaf: Certificate
    servers: dict[str, Certificate] = field(default_factory=dict)

    def rotate_at(self) -> float:
        return min(held.rotate_at().timestamp() for held in (self.leaf, *self.servers.values()))

    def is_of(self, authority: Authority, *, servers: bool) -> bool:
        own = (self.leaf, *self.servers.values()) if servers else (self.leaf,)
        return all(authority.is_signer(held) for held in own)


class Certificates:
    """Issues to every Envoy and replaces in time. Open connections keep the certificate that they began with.

    Identities of workloads are of the authority, or of a ``foreign`` issuer; certificates that gateways show to the
    outside, and those of tools, are of the authority in both cases.
    """

    def __init__(
        self,
        authority: Authority,
        sink: Sink,
        *,
        clock: Clock,
        changed: Callable[[], None],
        foreign: ForeignIssuer | None = None,
    ) -> None:
        self.authority = authority
        self.foreign = foreign
        self._sink = sink
        self._clock = clock
        self._changed = changed
        self._held: dict[str, _Held] = {}

    def leaf(self, node_id: str) -> Certificate | None:
        """The workload certificate that a node holds."""
        held = self._held.get(node_id)
        return held.leaf if held else None

    @property
    def nodes(self) -> Collection[str]:
        """Who holds certificates."""
        return self._held.keys()

    def provide(
        self,
        proxy: ProxyNode,
        credentials: tuple[ServerCredential, ...],
        *,
        trust_domain: str = "",
        bundles: tuple[Bundle, ...] = (),
    ) -> None:
        """Give a node its certificates, and roots; what it holds already is kept when it still fits.

        ``trust_domain`` is that of the mesh's settings; empty is the issuer's own.
        """
        held = self._held.get(proxy.id)
        identity = proxy.identity(trust_domain or self.authority.trust_domain)
        if held and held.credentials == credentials and held.leaf.identity == identity:
            if held.bundles != bundles:
                held.bundles = bundles
                self._give(held)
            return
        self._issue(proxy, credentials, trust_domain, bundles)

    def check(self, proxies: Iterable[ProxyNode], *, trust_domain: str = "") -> None:
        """Raise WrongState when a foreign issuer has no identity for one of these."""
        if self.foreign is not None:
            domain = trust_domain or self.authority.trust_domain
            self.foreign.check(proxy.identity(domain) for proxy in proxies)

    def forget(self, node_id: str) -> None:
        """The node is gone."""
        self._held.pop(node_id, None)

    def rotate(self) -> int:
        """New certificates for everybody now; gives how many nodes got one."""
        for held in list(self._held.values()):
            self._issue(held.proxy, held.credentials, held.trust_domain, held.bundles)
        self._changed()
        return len(self._held)

    def rotate_foreign(self, *, servers: bool) -> int:
        """New certificates for those whose own is not of the root that signs now; gives how many.

        Without ``servers`` gateways keep what they show to the outside: tools may know only the root before.
        """
        foreign = [held for held in self._held.values() if not held.is_of(self.authority, servers=servers)]
        for held in foreign:
            kept = {} if servers else held.servers
            self._issue(held.proxy, held.credentials, held.trust_domain, held.bundles, kept)
        self._changed()
        return len(foreign)

    def renew(self) -> int:
        """Give on what a foreign issuer has renewed; gives how many nodes got one."""
        issuer = self.foreign
        if issuer is None:
            return 0
        old = [held for held in self._held.values() if not issuer.is_current(held.leaf)]
        for held in old:
            try:
                self._issue(held.proxy, held.credentials, held.trust_domain, held.bundles)
            except WrongState as error:
                # It goes on with what it has, until that expires.
                logger.warning("an identity is issued no more", extra={"problem": error.message})
        self.redistribute()
        return len(old)

    def redistribute(self) -> None:
        """Give everybody the roots that are trusted now, with the certificates that they have."""
        for held in self._held.values():
            self._give(held)
        self._changed()

    async def run(self) -> None:
        """Replace certificates at half of their life, for ever."""
        while True:
            await asyncio.sleep(CHECK_S)
            self.rotate_due()

    def rotate_due(self) -> int:
        """Replace the certificates whose time has come; gives how many nodes got one."""
        if self.foreign is not None:
            return self.renew()
        now = self._clock().timestamp()
        due = [held for held in self._held.values() if held.rotate_at() <= now]
        for held in due:
            self._issue(held.proxy, held.credentials, held.trust_domain, held.bundles)
        if due:
            logger.info("certificates rotated", extra={"count": len(due)})
            self._changed()
        return len(due)

    def _issue(
        self,
        proxy: ProxyNode,
        credentials: tuple[ServerCredential, ...],
        trust_domain: str,
        bundles: tuple[Bundle, ...],
        servers: Mapping[str, Certificate] | None = None,
    ) -> None:
        held = _Held(
            proxy=proxy,
            credentials=credentials,
            bundles=bundles,
            trust_domain=trust_domain,
            leaf=self._leaf(proxy, trust_domain),
            servers=dict(servers)
            if servers
            else {item.name: self.authority.issue_server(item.hosts, item.addresses) for item in credentials},
        )
        self._held[proxy.id] = held
        self._give(held)

    def _leaf(self, proxy: ProxyNode, trust_domain: str) -> Certificate:
        issuer = self.foreign or self.authority
        domain = trust_domain or self.authority.trust_domain
        return issuer.issue(proxy.service_account, proxy.namespace, trust_domain=domain)

    def _give(self, held: _Held) -> None:
        own = self.authority.bundle_pem
        peers = self.foreign.bundle_pem if self.foreign else own
        roots = TrustSecret(roots=peers.encode())
        # Tools come from outside, through gateways, with certificates of the authority.
        callers = TrustSecret(roots=(peers if peers == own else own + peers).encode())
        secrets: dict[str, Secret] = {}
        for name, certificate in held.servers.items():
            secrets[credential_secret(name)] = _secret(certificate)
            secrets[root_secret(name)] = callers
        for bundle in held.bundles:
            secrets[bundle.name] = _given(bundle, callers)
        # Last: "builtin://" names the workload's own.
        secrets |= {WORKLOAD_SECRET: _secret(held.leaf), TRUST_SECRET: roots}
        self._sink.set_secrets(held.proxy.id, secrets)


def _given(bundle: Bundle, callers: TrustSecret) -> Secret:
    if isinstance(bundle, KeyPair):
        return CertificateSecret(certificate_chain=bundle.certificate.encode(), private_key=bundle.key.encode())
    return TrustSecret(roots=bundle.roots.encode()) if bundle.roots else callers


def _secret(certificate: Certificate) -> CertificateSecret:
    return CertificateSecret(certificate_chain=certificate.chain_pem.encode(), private_key=certificate.key_pem.encode())
