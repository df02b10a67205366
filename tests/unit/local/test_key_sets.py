"""Key sets by address: fetched in time, kept when a fetch fails, refused when they are none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from mlmesh_local.envoy_types import EXTENSIONS
from mlmesh_local.key_sets import REFRESH_S, RETRY_MAX_S, RETRY_S, KeySets, fetcher
from mlmesh_local.resources import ResourceSet
from mlmesh_local.snapshot import build_snapshots
from mlmesh_local.translate import View, translate
from mlmesh_local.translate.jwt import NO_KEYS
from mlmesh_runtime.executors import BoundedExecutor
from tests.support.mesh_world import load_alone, resource, world
from tests.support.tokens import Issuer

KEYS, OTHERS = Issuer().jwks, Issuer().jwks
URI = "https://keys.example/jwks"
RULE = f"{{issuer: a, jwksUri: '{URI}'}}"


def tokens(rule: str) -> str:
    return resource("RequestAuthentication", f"{{jwtRules: [{rule}]}}")


@dataclass
class Web:
    """What is at which address; what is not there cannot be reached."""

    pages: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, float]] = field(default_factory=list)

    def fetch(self, address: str, timeout_s: float) -> str:
        self.asked.append((address, timeout_s))
        if address not in self.pages:
            raise ConnectionRefusedError(address)
        return self.pages[address]


@dataclass
class Fetched:
    keys: KeySets
    web: Web
    now: float = 0.0
    changes: int = 0


@pytest.fixture
def executor() -> Iterator[BoundedExecutor]:
    executor = BoundedExecutor("keys", workers_max=2)
    yield executor
    executor.shutdown()


@pytest_asyncio.fixture
async def it(executor: BoundedExecutor) -> AsyncIterator[Fetched]:
    web = Web()

    def changed() -> None:
        found.changes += 1

    keys = KeySets(fetch=web.fetch, executor=executor, clock=lambda: found.now, changed=changed)
    found = Fetched(keys, web)
    yield found


def rules(text: str = RULE) -> ResourceSet:
    return load_alone(tokens(text))


async def test_keys_are_fetched_when_they_are_needed(it: Fetched) -> None:
    it.web.pages[URI] = KEYS
    await it.keys.need(rules(RULE.replace("}", ", timeout: 2s}")))
    assert it.keys.current() == {URI: KEYS}
    assert (it.web.asked, it.changes) == ([(URI, 2.0)], 1)
    await it.keys.need(rules())
    assert len(it.web.asked) == 1
    await it.keys.need(ResourceSet())
    assert it.keys.current() == {}


async def test_without_an_address_the_issuer_says_where_its_keys_are(it: Fetched) -> None:
    it.web.pages = {"https://a.example/.well-known/openid-configuration": f'{{"jwks_uri": "{URI}"}}', URI: KEYS}
    await it.keys.need(rules("{issuer: 'https://a.example/'}"))
    assert list(it.keys.current().values()) == [KEYS]


@pytest.mark.parametrize("page", ["", "no json", "{}", '{"keys": [{"kty": "XYZ"}]}', "[]", "[" * 100_000])
async def test_what_is_no_key_set_is_not_taken(it: Fetched, page: str) -> None:
    it.web.pages[URI] = page
    await it.keys.need(rules())
    assert it.keys.current() == {}
    it.web.pages = {"https://a.example/.well-known/openid-configuration": page}
    await it.keys.need(rules("{issuer: 'https://a.example/'}"))
    assert it.keys.current() == {}


async def test_keys_are_refreshed_and_the_last_good_ones_stay(it: Fetched) -> None:
    it.web.pages[URI] = KEYS
    await it.keys.need(rules())

    async def rounds(wait_s: float) -> None:
        it.now += wait_s
        await it.keys.refresh_due()

    await rounds(REFRESH_S - 1)
    assert len(it.web.asked) == 1
    del it.web.pages[URI]
    await rounds(1)
    assert (len(it.web.asked), it.keys.current()) == (2, {URI: KEYS})
    for wait_s in (RETRY_S, 2 * RETRY_S, 4 * RETRY_S):
        asked = len(it.web.asked)
        await rounds(wait_s - 1)
        assert len(it.web.asked) == asked
        await rounds(1)
        assert len(it.web.asked) == asked + 1
    it.web.pages[URI] = OTHERS
    await rounds(RETRY_MAX_S)
    assert (it.keys.current(), it.changes) == ({URI: OTHERS}, 2)


def test_unknown_keys_refuse_every_token_and_known_ones_are_in_the_filter() -> None:
    for fetched, expected in (({}, NO_KEYS), ({URI: KEYS}, KEYS)):
        found = world(tokens(RULE), key_sets=fetched)
        proxy = next(proxy for proxy in found.proxies if proxy.id == "server-v1")
        extension = translate(View(found), proxy)[EXTENSIONS]["envoy.filters.http.jwt_authn"]
        (provider,) = extension["typed_config"]["providers"].values()
        assert provider["local_jwks"] == {"inline_string": expected}
        build_snapshots(found)
    assert world(tokens(RULE)).version != world(tokens(RULE), key_sets={URI: KEYS}).version


async def test_services_of_the_mesh_are_found_by_their_names() -> None:
    seen: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(KEYS)}\r\n\r\n{KEYS}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        fetch = fetcher(lambda name, number: f"{host}:{port}" if (name, number) == ("issuer.mlmesh", 80) else "")
        assert await asyncio.to_thread(fetch, "http://issuer.mlmesh/keys?a=b", 2.0) == KEYS
        assert await asyncio.to_thread(fetch, f"http://{host}:{port}/keys", 2.0) == KEYS
        late = iter((0.0, 2.5))
        fetch_late = fetcher(lambda _name, _port: "", clock=lambda: next(late))
        with pytest.raises(TimeoutError, match="takes too long"):
            await asyncio.to_thread(fetch_late, f"http://{host}:{port}/keys", 2.0)
    assert seen[0].startswith("GET /keys?a=b HTTP/1.1\r\n")
    assert "\r\nHost: issuer.mlmesh\r\n" in seen[0]
    with pytest.raises(ValueError, match="not an http"):
        fetch("file:///etc/passwd", 1.0)
