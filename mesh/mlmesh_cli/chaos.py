"""Faults that Istio has a word for, as the YAML that says them; taken back from what that YAML remembers.

The faulted VirtualService carries the one before it in an annotation, so that `clear` finds what to restore whoever
injected the fault and whatever happened to them; on Kubernetes the same YAML does the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.apply import apply_documents
from mlmesh_cli.errors import CliError, usage_error

if TYPE_CHECKING:
    from mlmesh.local.v1.local_pb2_grpc import LocalMeshServiceAsyncStub

ORIGINAL = "chaos.mlmesh.dev/original"
SOURCE = "chaos.mlmesh.dev/source"
_KIND = "VirtualService"
_NAMESPACE = "mlmesh"
_DEADLINE_S = 30.0

Spec = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFault:
    """A fault of calls of a host. Exactly one of the delay and the statuses is set.

    Attributes:
        percent: share of the calls, 0 to 100.
        delay_s: calls are late by so much.
        grpc_status, http_status: calls end at once, with this.
        method: only calls of this gRPC method, "/package.Service/Method".
        headers: only calls with all of these headers.
    """

    percent: float = 100.0
    delay_s: float = 0.0
    grpc_status: str = ""
    http_status: int = 0
    method: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def spec(self) -> Spec:
        """HTTPFaultInjection, https://istio.io/latest/docs/reference/config/networking/virtual-service/."""
        share = {"percentage": {"value": self.percent}}
        if self.delay_s:
            return {"delay": {**share, "fixedDelay": f"{self.delay_s * 1000:g}ms"}}
        status = {"grpcStatus": self.grpc_status} if self.grpc_status else {"httpStatus": self.http_status}
        return {"abort": {**share, **status}}

    @property
    def selective(self) -> bool:
        """Whether it is meant for some calls only."""
        return bool(self.method or self.headers)

    def matched(self, match: Spec) -> Spec | None:
        """A match narrowed to the calls that are meant; None where none of them can match."""
        result = copy.deepcopy(match)
        if self.method:
            if result.get("uri", {"exact": self.method}) != {"exact": self.method}:
                return None
            result["uri"] = {"exact": self.method}
        headers = {name: {"exact": value} for name, value in self.headers.items()}
        own = result.get("headers", {})
        if any(own.get(name, wanted) != wanted for name, wanted in headers.items()):
            return None
        if headers:
            result["headers"] = {**own, **headers}
        return result


def faulted(document: Spec, fault: RouteFault) -> Spec:
    """A VirtualService in which calls meet the fault. Raises CliError where no rule can carry it."""
    result = copy.deepcopy(document)
    rules: list[Spec] = []
    for rule in result["spec"].get("http", ()):
        if not fault.selective:
            rules.append({**rule, "fault": fault.spec()})
            continue
        narrowed = [fault.matched(match) for match in rule.get("match") or [{}]]
        matches = [match for match in narrowed if match is not None]
        if matches:
            name = ".".join(part for part in (rule.get("name", ""), "chaos") if part)
            rules.append({**rule, "name": name, "match": matches, "fault": fault.spec()})
        rules.append(rule)
    if not any("fault" in rule for rule in rules):
        raise CliError(
            f"no rule of VirtualService {document['metadata']['name']} can match those calls",
            "look at its rules with `mlmesh routes`",
            reason="NOTHING_TO_FAULT",
        )
    result["spec"]["http"] = rules
    return result


def remembering(document: Spec, original: str, source: str) -> Spec:
    """The document with what it replaces in its annotations."""
    metadata = document["metadata"]
    metadata["annotations"] = {**(metadata.get("annotations") or {}), ORIGINAL: original, SOURCE: source}
    return document


def plain(host: str) -> Spec:
    """A VirtualService that changes nothing, for a host that has none."""
    name, _, rest = host.partition(".")
    namespace, _, suffix = rest.partition(".")
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": _KIND,
        "metadata": {"name": f"{name}-chaos", "namespace": namespace if suffix.startswith("svc") else _NAMESPACE},
        "spec": {"hosts": [host], "http": [{"route": [{"destination": {"host": host}}]}]},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Active:
    """A VirtualService that is active. ``original`` is what it replaces, None where it is nobody's fault."""

    document: Spec
    text: str
    source: str
    original: str | None

    @property
    def name(self) -> str:
        """ "{namespace}/{name}"."""
        metadata = self.document["metadata"]
        return f"{metadata.get('namespace', _NAMESPACE)}/{metadata['name']}"


async def virtual_services(stub: LocalMeshServiceAsyncStub) -> list[Active]:
    """Those that are active."""
    response = await stub.ListResources(pb.ListResourcesRequest(kind=_KIND), timeout=_DEADLINE_S)
    found = []
    for resource in response.resources:
        document = yaml.safe_load(resource.yaml)
        annotations = document["metadata"].get("annotations") or {}
        found.append(
            Active(
                document=document,
                text=resource.yaml,
                source=annotations.get(SOURCE, resource.source),
                original=annotations.get(ORIGINAL),
            )
        )
    return found


def prepared(services: Sequence[Active], host: str, fault: RouteFault) -> dict[str, str]:
    """YAML by name of VirtualServices that inject a fault into calls of a host, from sidecars and through gateways.

    A fault before it is replaced. Where no VirtualService speaks of the host to sidecars, one is made.
    """
    result: dict[str, str] = {}
    for_sidecars = False
    for active in services:
        if host not in {_full(name, active) for name in active.document["spec"].get("hosts", ())}:
            continue
        original = active.text if active.original is None else active.original
        base = yaml.safe_load(original) if original else plain(host)
        result[active.name] = _text(remembering(faulted(base, fault), original, active.source))
        for_sidecars = for_sidecars or "mesh" in (base["spec"].get("gateways") or ["mesh"])
    if not for_sidecars:
        document = remembering(faulted(plain(host), fault), "", "")
        result[f"{document['metadata']['namespace']}/{document['metadata']['name']}"] = _text(document)
    return result


async def inject(stub: LocalMeshServiceAsyncStub, texts: Mapping[str, str]) -> pb.ApplyResponse:
    """Make faulted VirtualServices active."""
    return await apply_documents(stub, [(Path(f"chaos of {name}"), text) for name, text in texts.items()])


async def restore(stub: LocalMeshServiceAsyncStub, names: Sequence[str] = ()) -> list[str]:
    """Take faults of routes back, those of the VirtualServices named or all; gives their names."""
    restored = []
    for active in await virtual_services(stub):
        if active.original is None or (names and active.name not in names):
            continue
        if active.original:
            await apply_documents(stub, [(Path(active.source), active.original)])
        else:
            request = pb.DeleteResourcesRequest(allow_missing=True)
            request.resources.add(kind=_KIND, name=active.name)
            await stub.DeleteResources(request, timeout=_DEADLINE_S)
        restored.append(active.name)
    return restored


def header_pairs(texts: Sequence[str]) -> dict[str, str]:
    """Headers written as NAME=VALUE. Raises CliError (wrong usage)."""
    result = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise usage_error(f"--header {text!r} is not NAME=VALUE", "such as --header x-user=ada")
        result[name.lower()] = value
    return result


def _full(host: str, active: Active) -> str:
    return host if "." in host else f"{host}.{active.name.partition('/')[0]}.svc.cluster.local"


class _Dumper(yaml.SafeDumper):
    """Without aliases, and with texts of several lines as they are: for people to read."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (its signature)
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _text(document: Spec) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)
