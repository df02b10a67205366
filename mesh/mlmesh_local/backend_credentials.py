"""Which Secrets a proxy needs for TLS to servers outside of the mesh: those that DestinationRules name."""

from __future__ import annotations

from collections.abc import Iterator

from mlmesh_local.certificates import KeyPair, RootBundle
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import selects
from mlmesh_local.resources.credentials import Credential, client_rules, roots_for, secret_place
from mlmesh_local.resources.model import DestinationRule
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.translate import credential_secret, root_secret


def backend_credentials(resources: ResourceSet, proxy: ProxyNode) -> tuple[RootBundle | KeyPair, ...]:
    """What Secrets of the proxy's namespace hold: for gateways, and for sidecars that a rule's selector names.

    A Secret that is not there is given to nobody: the cluster waits for it, and calls fail, as in Istio.
    """
    known = {(one.meta.namespace, one.meta.name): one for one in resources.specs(Credential)}
    if not known:
        return ()
    found: dict[str, RootBundle | KeyPair] = {}
    for name in sorted(set(_names(resources, proxy))):
        place = secret_place(name, proxy.namespace)
        if place is None:
            continue
        roots = roots_for(place, known)
        if roots:
            found[root_secret(name)] = RootBundle(name=root_secret(name), roots=roots)
        pair = known.get(place)
        if pair is not None and pair.certificate:
            own = credential_secret(name)
            found[own] = KeyPair(name=own, certificate=pair.certificate, key=pair.key)
    return tuple(found.values())


def _names(resources: ResourceSet, proxy: ProxyNode) -> Iterator[str]:
    for rule in resources.specs(DestinationRule):
        scoped = (
            rule.selector is not None
            and rule.meta.namespace == proxy.namespace
            and selects(rule.selector, proxy.labels)
        )
        if proxy.kind == "gateway" or scoped:
            yield from (tls.credential_name for tls in client_rules(rule) if tls.credential_name)
