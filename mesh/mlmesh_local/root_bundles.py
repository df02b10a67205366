"""Which roots a proxy needs beside those of the mesh: of backends outside of it, and of clients of a gateway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlmesh_local.certificates import RootBundle
from mlmesh_local.resources.credentials import client_rules
from mlmesh_local.resources.gateway_api.model_tls import CaBundle
from mlmesh_local.resources.model import DestinationRule, Gateway
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.translate import IN_CONFIG_MAP, credential_secret, root_secret

_SUFFIX = "-cacert"


def backend_bundles(resources: ResourceSet) -> tuple[RootBundle, ...]:
    """Roots in ConfigMaps that DestinationRules name (those of policies among them): everybody has them."""
    known = _known(resources)
    if not known:
        return ()
    names = {
        name
        for rule in resources.specs(DestinationRule)
        for tls in client_rules(rule)
        if (name := tls.credential_name).startswith(IN_CONFIG_MAP)
    }
    return _bundles((root_secret(name) for name in names), known)


def client_bundles(resources: ResourceSet, gateways: Iterable[Gateway]) -> tuple[RootBundle, ...]:
    """Roots that gateways check their clients with: of a ConfigMap, or for a Secret the authority's own."""
    names = {
        credential_secret(server.tls.ca_credential_name)
        for gateway in gateways
        for server in gateway.servers
        if server.tls and server.tls.ca_credential_name
    }
    return _bundles(names, _known(resources))


def _known(resources: ResourceSet) -> Mapping[str, CaBundle]:
    return {
        f"{IN_CONFIG_MAP}{one.meta.namespace}/{one.meta.name}": one for one in resources.specs(CaBundle) if one.valid
    }


def _bundles(names: Iterable[str], known: Mapping[str, CaBundle]) -> tuple[RootBundle, ...]:
    found: list[RootBundle] = []
    for name in sorted(names):
        if not name.startswith(IN_CONFIG_MAP):
            found.append(RootBundle(name=name))
        elif (one := known.get(name.removesuffix(_SUFFIX))) is not None:
            found.append(RootBundle(name=name, roots=one.roots))
    return tuple(found)
