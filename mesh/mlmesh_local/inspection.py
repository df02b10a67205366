"""What proxies of a world are told, by short type names, with the versions that Envoy sees. Pure."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES, Json
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.snapshot import build_snapshots
from mlmesh_local.translate import View, translate
from mlmesh_runtime.errors import InvalidInput, NotFound

TYPES: Mapping[str, str] = {
    "listeners": LISTENER,
    "routes": ROUTES,
    "clusters": CLUSTER,
    "endpoints": ENDPOINTS,
    "extensions": EXTENSIONS,
}
"""Type URLs by the short names that people use, in the order in which a call meets them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One Envoy resource of one proxy. ``version`` is what the control plane sends with it, ``size`` its bytes."""

    proxy: str
    type: str
    name: str
    version: str
    size: int
    content: Json


def items(world: World, proxies: tuple[ProxyNode, ...], types: tuple[str, ...] = ()) -> Iterator[Item]:
    """Every resource of these proxies, in the order of proxies, `TYPES` and names.

    Raises InvalidInput for a type that is not of `TYPES`, InvalidResource when the world cannot be translated.
    """
    for name in types:
        type_url(name)
    view = View(world)
    snapshots = build_snapshots(dataclasses.replace(world, proxies=proxies))
    for proxy in proxies:
        configuration = translate(view, proxy)
        for short, url in TYPES.items():
            if types and short not in types:
                continue
            packed = snapshots[proxy.id].resources.get(url, {})
            for name, content in sorted(configuration.get(url, {}).items()):
                yield Item(
                    proxy=proxy.id,
                    type=short,
                    name=name,
                    version=packed[name].version,
                    size=len(packed[name].content),
                    content=content,
                )


def type_url(name: str) -> str:
    """The type URL of a short name. Raises InvalidInput that lists those there are."""
    if name not in TYPES:
        raise InvalidInput(f"no type is called {name!r}; there are {', '.join(TYPES)}", field="type")
    return TYPES[name]


def find_proxies(world: World, name: str) -> tuple[ProxyNode, ...]:
    """Proxies that a person means: an instance ("inference-v1-0"), or all of a workload ("inference-v1").

    Either may be completed by its namespace, "mlmesh/inference-v1". Raises NotFound that names what is near.
    """
    namespace, _, plain = name.rpartition("/")
    here = [proxy for proxy in world.proxies if namespace in ("", proxy.namespace)]
    found = [proxy for proxy in here if proxy.id == plain] or [proxy for proxy in here if workload_of(proxy) == plain]
    if found:
        return tuple(found)
    known = sorted({word for proxy in world.proxies for word in (proxy.id, workload_of(proxy))})
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(known) or 'none'}"
    raise NotFound(f'no workload or instance is called "{name}"; {hint}', reason="WORKLOAD_NOT_FOUND")


def workload_of(proxy: ProxyNode) -> str:
    """Name of the Deployment that a proxy belongs to."""
    return proxy.id.partition(".")[0].rpartition("-")[0]
