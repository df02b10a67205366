"""Key sets of token issuers, fetched by the control plane as istiod does: cached, refreshed, the last good one kept.

A rule whose keys could not be fetched yet has a key set for which no token is valid: it fails closed. Times are those
of istiod (pilot/pkg/model/jwks_resolver.go).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlmesh_local.resources.model import JwtRule, RequestAuthentication
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.resources.security.keys import problem_of_keys
from mlmesh_local.translate.jwt import key_source
from mlmesh_runtime.errors import Overloaded
from mlmesh_runtime.executors import BoundedExecutor

logger = logging.getLogger(__name__)

REFRESH_S = 20 * 60.0
RETRY_S = 60.0
RETRY_MAX_S = 60 * 60.0
FETCH_TIMEOUT_S = 5.0
BYTES_MAX = 1024 * 1024
PIECE_BYTES = 64 * 1024
_DISCOVERY = "/.well-known/openid-configuration"

Resolve = Callable[[str, int], str]
""" "host:port" at which a service of the mesh is reached from outside of it; empty for hosts that are none."""
Fetch = Callable[[str, float], str]
"""The text at an address, within seconds. Blocks. Raises OSError or ValueError."""


@dataclass(slots=True)
class _Source:
    """One address of keys. ``keys`` is the last good set, empty when there was none yet."""

    timeout_s: float
    keys: str = ""
    due_s: float = 0.0
    failures: int = 0


class KeySets:
    """Keys by address, for the rules that are active. Use it from one event loop."""

    def __init__(
        self,
        *,
        fetch: Fetch,
        executor: BoundedExecutor,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._fetch = fetch
        self._executor = executor
        self._clock = clock
        self._changed = changed
        self._sources: dict[str, _Source] = {}
        self._wake = asyncio.Event()

    def current(self) -> Mapping[str, str]:
        """What is known, by address."""
        return {address: source.keys for address, source in self._sources.items() if source.keys}

    async def need(self, resources: ResourceSet) -> None:
        """Make the keys of these resources known, each within its rule's timeout; a failure is tried again later."""
        wanted = {key_source(rule): rule for rule in rules_with_address(resources)}
        for address in self._sources.keys() - wanted.keys():
            del self._sources[address]
        new = wanted.keys() - self._sources.keys()
        for address in new:
            timeout_s = wanted[address].timeout_s
            self._sources[address] = _Source(timeout_s=FETCH_TIMEOUT_S if timeout_s is None else timeout_s)
        await self._fetch_all(new)
        self._wake.set()

    async def run(self) -> None:
        """Fetch again when the time has come, for ever."""
        while True:
            await self.refresh_due()
            self._wake.clear()
            due = min((source.due_s for source in self._sources.values()), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due is None else max(0.0, due - self._clock())):
                    await self._wake.wait()

    async def refresh_due(self) -> None:
        """Fetch those whose time has come."""
        now = self._clock()
        await self._fetch_all([address for address, source in self._sources.items() if source.due_s <= now])

    async def _fetch_all(self, addresses: Iterable[str]) -> None:
        before = self.current()
        async with asyncio.TaskGroup() as group:
            for address in addresses:
                group.create_task(self._fetch_one(address, self._sources[address]))
        if self.current() != before:
            self._changed()

    async def _fetch_one(self, address: str, source: _Source) -> None:
        try:
            text = await self._executor.run(self._keys, address, source.timeout_s)
        except (OSError, ValueError, http.client.HTTPException, Overloaded) as error:
            delay_s = min(RETRY_S * 2**source.failures, RETRY_MAX_S)
            source.failures += 1
            what = "the last good ones stay" if source.keys else "no token of this issuer is valid"
            logger.warning(
                "keys of an issuer cannot be fetched: %s", what, extra={"at": address, "problem": str(error)}
            )
        else:
            source.keys, source.failures, delay_s = text, 0, REFRESH_S
        source.due_s = self._clock() + delay_s

    def _keys(self, address: str, timeout_s: float) -> str:
        if address.endswith(_DISCOVERY):
            found = _json(self._fetch(address, timeout_s))
            uri = found.get("jwks_uri") if isinstance(found, dict) else None
            if not isinstance(uri, str):
                raise ValueError("the OpenID configuration has no jwks_uri")
            address = uri
        text = self._fetch(address, timeout_s)
        if problem := problem_of_keys(text):
            raise ValueError(f"not a key set: {problem}")
        return text


def rules_with_address(resources: ResourceSet) -> list[JwtRule]:
    """Rules whose keys are fetched."""
    rules = (rule for policy in resources.specs(RequestAuthentication) for rule in policy.rules)
    return [rule for rule in rules if not rule.jwks]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error


def fetcher(resolve: Resolve, *, clock: Callable[[], float] = time.monotonic) -> Fetch:
    """Fetches over HTTP. Services of the mesh are called as something outside of it would, in plaintext."""

    def fetch(address: str, timeout_s: float) -> str:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https"):
            raise ValueError(f"not an http:// or https:// address: {address}")
        deadline_s = clock() + timeout_s
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        inside = resolve(host, port) if parts.scheme == "http" else ""
        if inside:
            path = f"{parts.path or '/'}?{parts.query}".rstrip("?")
            with _call(inside, parts.netloc, path, timeout_s) as answer:
                return _text(answer, lambda: clock() > deadline_s)
        try:
            with urllib.request.urlopen(address, timeout=timeout_s) as answer:  # noqa: S310  (the scheme was checked)
                return _text(answer, lambda: clock() > deadline_s)
        except urllib.error.HTTPError as refusal:
            # It holds the connection.
            refusal.close()
            raise

    return fetch


@contextlib.contextmanager
def _call(address: str, host: str, path: str, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise urllib.error.URLError(f"status {answer.status}")
        yield answer
    finally:
        connection.close()


def _text(answer: http.client.HTTPResponse, is_late: Callable[[], bool]) -> str:
    """All of an answer. A socket's timeout bounds each wait; a server that sends byte by byte would never meet it."""
    content = bytearray()
    while piece := answer.read1(PIECE_BYTES):
        content += piece
        if len(content) > BYTES_MAX:
            raise ValueError(f"more than {BYTES_MAX} bytes")
        if is_late():
            raise TimeoutError("the answer takes too long")
    return content.decode()
