"""Extension providers of MeshConfig: what resources name when something outside of the mesh decides, traces or logs."""

from __future__ import annotations

from typing import Final, Literal

from mlmesh_local.resources.external_authorizers import parse_external_authorizer
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model_security import ExternalAuthorizer

_AUTHORIZERS: Final[dict[str, Literal["grpc", "http"]]] = {"envoyExtAuthzGrpc": "grpc", "envoyExtAuthzHttp": "http"}


def parse_authorizers(fields: Fields) -> tuple[ExternalAuthorizer, ...]:
    """External authorizers in `extensionProviders`; names are those of one provider of any kind."""
    found: list[ExternalAuthorizer] = []
    names: set[str] = set()
    for provider in fields.messages("extensionProviders"):
        name = provider.text("name", required=True)
        if name in names:
            provider.refuse("name", f'"{name}" is the name of another provider')
        names.add(name)
        for field, protocol in _AUTHORIZERS.items():
            if provider.has(field):
                found.append(parse_external_authorizer(name, provider.message(field), protocol))
    return tuple(found)
