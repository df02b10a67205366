"""Filters that take their configuration over ECDS: it changes on open connections, and the listener stays as it is.

    filters = [discovered("mlmesh.authorization", RBAC)]                       # in a listener
    extensions = {"mlmesh.authorization": extension("mlmesh.authorization", RBAC, rules)}

A filter that has nothing to do now is given an empty configuration, so that something to do is not a new listener. The
acknowledgement of an extension means that the next request of every connection meets it.
"""

from __future__ import annotations

from mlmesh_local.envoy_types import TYPE_PREFIX, Json, typed
from mlmesh_local.translate.names import ADS


def discovered(name: str, *messages: str) -> Json:
    """A filter of a listener whose configuration is the extension of that name, one of these messages.

    Until it has come the listener takes no connections. Names are one space for all listeners of a proxy: filters of
    one name share one configuration.
    """
    types = [TYPE_PREFIX + message for message in messages]
    return {"name": name, "config_discovery": {"config_source": ADS, "type_urls": types}}


def extension(name: str, message: str, value: Json | None = None) -> Json:
    """The configuration that filters of that name take."""
    return {"name": name, "typed_config": typed(message, value)}
