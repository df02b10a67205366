"""As much of the Kubernetes API as Istio's control plane asks for: lists, watches and written statuses.

HTTP/1.1 on loopback, JSON only. Every path begins with a secret: Kubernetes' clients send tokens over TLS only.
Resources that nobody stored are empty lists: to a controller that is a cluster without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlmesh_local.istiod.store import ClosedError, ExpiredError, Object, Resource, Store

logger = logging.getLogger(__name__)

HEADER_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 4 * 1024 * 1024
CONNECTIONS_MAX = 512
BOOKMARK_S = 60.0
_INITIAL_END = "k8s.io/initial-events-end"
_VERSION = {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "mlmesh"}
_STATUSES = {200: "OK", 201: "Created", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 410: "Gone"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What a path names: a collection, or one object (with a part such as "status")."""

    resource: Resource
    version: str
    namespace: str
    name: str
    part: str


class KubernetesApi:
    """The API of a store. ``kinds`` gives the kind of a resource for lists of nothing."""

    def __init__(self, store: Store, *, token: str, kinds: Mapping[Resource, str]) -> None:
        self.store = store
        self._token = token
        self._kinds = kinds
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[Any]] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._connected, host, port, limit=HEADER_BYTES_MAX)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """End every connection and the server."""
        if self._server is not None:
            self._server.close()
        self.store.close()
        for writer in self._connections:
            writer.close()
        await asyncio.gather(*self._connections.values(), return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._connections[writer] = task
        try:
            while (request := await _read(reader)) is not None:
                if not await self._answer(request, writer):
                    break
        except (
            ClosedError,
            ConnectionError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            ValueError,
        ) as error:
            logger.debug("a connection to the Kubernetes API ended: %r", error)
        finally:
            self._connections.pop(writer, None)
            with contextlib.suppress(OSError):
                writer.close()

    async def _answer(self, request: _Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection can be used again."""
        given, _, path = request.path.strip("/").partition("/")
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            await _send(writer, 401, _status(401, "Unauthorized", "the secret is missing"))
            return True
        if path == "version":
            await _send(writer, 200, _VERSION)
            return True
        target = _target(path)
        if target is None:
            await _send(writer, 404, _status(404, "NotFound", f"no such path: {request.path}"))
            return True
        if request.method == "GET" and not target.name and request.query.get("watch") in {"true", "1"}:
            await self._watch(request, target, writer)
            return False
        code, body = (
            self._one(request, target) if target.name or request.method != "GET" else self._all(request, target)
        )
        await _send(writer, code, body)
        return True

    def _all(self, request: _Request, target: _Target) -> tuple[int, Any]:
        partial = _partial(request)
        found = [item for item in self.store.all(target.resource) if _selected(item, request, target)]
        items = [_shown(item, target, partial) for item in found]
        kind = self._kinds.get(target.resource, "Unknown")
        return 200, {
            "kind": "PartialObjectMetadataList" if partial else f"{kind}List",
            "apiVersion": "meta.k8s.io/v1" if partial else _api_version(target),
            "metadata": {"resourceVersion": str(self.store.version)},
            "items": items,
        }

    def _one(self, request: _Request, target: _Target) -> tuple[int, Any]:
        found = self.store.get(target.resource, target.namespace, target.name)
        if request.method == "GET":
            if found is None:
                return 404, _status(404, "NotFound", f"{target.resource.plural} {target.name} is not there")
            return 200, _shown(found, target, _partial(request))
        if request.method in {"PUT", "PATCH"} and target.part == "status" and found is not None:
            written = json.loads(request.body)
            if isinstance(written, dict):
                found = self.store.put(target.resource, {**found, "status": written.get("status", {})})
            return 200, _shown(found, target, partial=False)
        return 403, _status(403, "Forbidden", "this API takes statuses only")

    async def _watch(self, request: _Request, target: _Target, writer: asyncio.StreamWriter) -> None:
        partial = _partial(request)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        asked = request.query.get("resourceVersion", "")
        seen = int(asked) if asked.isdigit() and asked != "0" else self.store.version
        if request.query.get("sendInitialEvents") == "true":
            seen = self.store.version
            for item in self.store.all(target.resource):
                if _selected(item, request, target):
                    _chunk(writer, {"type": "ADDED", "object": _shown(item, target, partial)})
            _chunk(writer, self._bookmark(target, seen, partial, initial=True))
        while True:
            await writer.drain()
            try:
                events = self.store.since(seen)
            except ExpiredError:
                _chunk(writer, {"type": "ERROR", "object": _status(410, "Expired", "too old a version")})
                return
            for event in events:
                seen = event.version
                if event.resource == target.resource and _selected(event.object, request, target):
                    _chunk(writer, {"type": event.action, "object": _shown(event.object, target, partial)})
            await writer.drain()
            try:
                async with asyncio.timeout(BOOKMARK_S):
                    await self.store.beyond(seen)
            except TimeoutError:
                seen = max(seen, self.store.version)
                _chunk(writer, self._bookmark(target, seen, partial, initial=False))

    def _bookmark(self, target: _Target, version: int, partial: bool, *, initial: bool) -> Object:
        metadata: Object = {"resourceVersion": str(version)}
        if initial:
            metadata["annotations"] = {_INITIAL_END: "true"}
        kind = "PartialObjectMetadata" if partial else self._kinds.get(target.resource, "Unknown")
        api = "meta.k8s.io/v1" if partial else _api_version(target)
        return {"type": "BOOKMARK", "object": {"kind": kind, "apiVersion": api, "metadata": metadata}}


def _api_version(target: _Target) -> str:
    return f"{target.resource.group}/{target.version}".lstrip("/")


def _partial(request: _Request) -> bool:
    return "as=PartialObjectMetadata" in request.headers.get("accept", "")


def _shown(item: Object, target: _Target, partial: bool) -> Object:
    """An object as it is asked for: in the version of the path, or its metadata alone."""
    if not partial:
        return {**item, "apiVersion": _api_version(target)}
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}


def _selected(item: Object, request: _Request, target: _Target) -> bool:
    metadata = item["metadata"]
    if target.namespace and metadata.get("namespace") != target.namespace:
        return False
    for key, equal, value in _terms(request.query.get("fieldSelector", "")):
        place = {"metadata.name": "name", "metadata.namespace": "namespace"}.get(key)
        if place is not None and (metadata.get(place, "") == value) != equal:
            return False
    labels = metadata.get("labels", {})
    for key, equal, value in _terms(request.query.get("labelSelector", "")):
        if value == "" and not equal:
            return key.removeprefix("!") not in labels
        if (labels.get(key) == value if value else key in labels) != equal:
            return False
    return True


def _terms(text: str) -> Iterator[tuple[str, bool, str]]:
    """Parts of a selector: key, whether it shall be equal, value; an empty value asks for the key."""
    for part in filter(None, text.split(",")):
        if "!=" in part:
            key, _, value = part.partition("!=")
            yield key, False, value
        elif part.startswith("!"):
            yield part[1:], False, ""
        else:
            key, _, value = part.replace("==", "=").partition("=")
            yield key, True, value


def _target(path: str) -> _Target | None:
    parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
    if len(parts) >= 3 and parts[0] == "api":
        group, version, rest = "", parts[1], parts[2:]
    elif len(parts) >= 4 and parts[0] == "apis":
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    namespace = ""
    if rest[0] == "namespaces" and len(rest) >= 3:
        namespace, rest = rest[1], rest[2:]
    name, part = (rest[1] if len(rest) > 1 else ""), (rest[2] if len(rest) > 2 else "")
    return _Target(
        resource=Resource(group=group, plural=rest[0]), version=version, namespace=namespace, name=name, part=part
    )


async def _read(reader: asyncio.StreamReader) -> _Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.split("\r\n")
    method, address, _ = first.split(" ", 2)
    headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
    length = int(headers.get("content-length", "0"))
    if length > BODY_BYTES_MAX:
        raise ValueError("the body is too large")
    body = await reader.readexactly(length)
    parsed = urllib.parse.urlsplit(address)
    query = dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))
    return _Request(method=method, path=parsed.path, query=query, headers=headers, body=body)


async def _send(writer: asyncio.StreamWriter, code: int, body: Any) -> None:
    content = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {code} {_STATUSES[code]}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await writer.drain()


def _chunk(writer: asyncio.StreamWriter, value: Any) -> None:
    content = json.dumps(value).encode() + b"\n"
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def _status(code: int, reason: str, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }
