"""Who gets in: certificates, identities, rotation. A refusal counts only when no handler ran."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlmesh_runtime.channel import ClientTls, mesh_error, open_channel
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.identity import current_identity
from mlmesh_runtime.telemetry import REGISTRY
from mlmesh_runtime.tls import RotatingCredentials
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service
from tests.support.pki import SERVER_NAME, Authority, spiffe
from tests.support.server import serving

REGISTRY_ID, OPERATOR_ID = spiffe("registry"), spiffe("operator")
FORGED = (("x-forwarded-client-cert", f"By=x;URI={OPERATOR_ID}"),)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


class Naming(EchoServicer):
    """Answers with the caller's identity."""

    async def Unary(self, request: Any, _context: Any) -> Any:
        self.calls += 1
        return Text(text=current_identity())


async def ask(address: str, tls: ClientTls | None, timeout: float = 10) -> str:
    async with open_channel(address, tls=tls) as channel:
        return str((await PROTOS.stub(channel).Unary(Text(), timeout=timeout, metadata=FORGED)).text)


async def test_the_identity_is_the_certificates_whatever_the_header_says(authority: Authority, tmp_path: Path) -> None:
    files = authority.leaf(REGISTRY_ID).write(tmp_path / "server", authority.pem)
    client = authority.leaf(REGISTRY_ID).client(tmp_path / "client", authority.pem)
    async with serving(echo_service(Naming()), tls=files, identity_source="tls") as server:
        assert await ask(server.address, client) == REGISTRY_ID


@pytest.mark.parametrize("who", ["plaintext", "no certificate", "another authority", "expired", "not yet valid"])
async def test_refused_before_any_handler(who: str, authority: Authority, tmp_path: Path) -> None:
    servicer = Naming()
    files = authority.leaf(REGISTRY_ID).write(tmp_path / "server", authority.pem)
    clients: dict[str, ClientTls | None] = {
        "plaintext": None,
        "no certificate": ClientTls(ca=files.ca, server_name=SERVER_NAME),
        "another authority": Authority().leaf(OPERATOR_ID).client(tmp_path / "other", authority.pem),
        "expired": authority.expired(OPERATOR_ID).client(tmp_path / "expired", authority.pem),
        "not yet valid": authority.leaf(OPERATOR_ID, starts_in=timedelta(hours=1), ends_in=timedelta(hours=2)).client(
            tmp_path / "early", authority.pem
        ),
    }
    good = authority.leaf(REGISTRY_ID).client(tmp_path / "good", authority.pem)
    async with serving(echo_service(servicer), tls=files, identity_source="tls") as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(server.address, clients[who])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert servicer.calls == 0
        assert await ask(server.address, good) == REGISTRY_ID  # the server is well, the caller was not


async def test_a_client_refuses_a_server_of_another_authority(authority: Authority, tmp_path: Path) -> None:
    servicer = Naming()
    stranger = Authority()
    files = stranger.leaf(REGISTRY_ID).write(tmp_path / "server", authority.pem)
    client = authority.leaf(REGISTRY_ID).client(tmp_path / "client", authority.pem)
    async with serving(echo_service(servicer), tls=files, identity_source="tls") as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(server.address, client)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert servicer.calls == 0


async def test_a_certificate_with_two_identities_is_refused(authority: Authority, tmp_path: Path) -> None:
    servicer = Naming()
    files = authority.leaf(REGISTRY_ID).write(tmp_path / "server", authority.pem)
    two = authority.leaf(REGISTRY_ID, OPERATOR_ID).client(tmp_path / "two", authority.pem)
    nobody = authority.leaf().client(tmp_path / "nobody", authority.pem)
    async with serving(echo_service(servicer), tls=files, identity_source="tls") as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(server.address, two)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert mesh_error(caught.value).reason == "AMBIGUOUS_IDENTITY"
        assert servicer.calls == 0
        assert await ask(server.address, nobody) == ""


@pytest.mark.parametrize(("source", "identity"), [("xfcc", REGISTRY_ID), ("none", "")])
async def test_behind_a_sidecar_the_last_element_counts(source: str, identity: str) -> None:
    header = f'By=a;URI={OPERATOR_ID},By=b;Hash=00;Subject="O=x,CN=y";URI={REGISTRY_ID}'
    async with (
        serving(echo_service(Naming()), identity_source=source) as server,
        open_channel(server.address) as channel,
    ):
        answer = await PROTOS.stub(channel).Unary(Text(), metadata=(("x-forwarded-client-cert", header),))
    assert answer.text == identity


async def test_rotation_under_load_loses_no_call(authority: Authority, tmp_path: Path) -> None:
    """Both ends move to a new authority while one stream stays open and new connections are made all the time."""
    fresh = Authority("the next root")
    both = authority.pem + fresh.pem
    folder = tmp_path / "server"
    files = authority.leaf(REGISTRY_ID).write(folder, both)
    old_client = authority.leaf(REGISTRY_ID).client(tmp_path / "old", both)
    new_client = fresh.leaf(OPERATOR_ID).client(tmp_path / "new", fresh.pem)
    async with (
        serving(echo_service(Naming()), tls=files, identity_source="tls") as server,
        open_channel(server.address, tls=old_client) as channel,
    ):
        stream = PROTOS.stub(channel).Chat(timeout=30)
        await stream.write(Text(text="before"))
        assert (await stream.read()).text == "before"
        rotated, answers = asyncio.Event(), []

        async def load_new_connections() -> None:
            while not rotated.is_set():
                answers.append(await ask(server.address, old_client))

        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(load_new_connections())
            for _ in range(3):
                await asyncio.to_thread(fresh.leaf(REGISTRY_ID).write, folder, both)
                # Who trusts the new authority only is served from the next handshake on.
                assert await ask(server.address, new_client) == OPERATOR_ID
            rotated.set()
        assert set(answers) == {REGISTRY_ID}
        await stream.write(Text(text="after"))
        assert (await stream.read()).text == "after"
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK


def reloads(outcome: str) -> float:
    return REGISTRY.get_sample_value("mlmesh_tls_reloads_total", {"outcome": outcome}) or 0.0


@pytest.mark.parametrize("fault", ["half written", "key of another", "expired", "missing", "authority garbled"])
async def test_a_broken_rotation_keeps_the_old_certificate(
    fault: str, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "server"
    files = authority.leaf(REGISTRY_ID).write(folder, authority.pem)
    client = authority.leaf(REGISTRY_ID).client(tmp_path / "client", authority.pem)
    before = reloads("refused")
    async with serving(echo_service(Naming()), tls=files, identity_source="tls") as server:
        match fault:
            case "half written":
                files.cert.write_bytes(files.cert.read_bytes()[:200])
            case "key of another":
                files.key.write_bytes(authority.leaf().key)
            case "expired":
                authority.expired(REGISTRY_ID).write(folder, authority.pem)
            case "missing":
                files.key.unlink()
            case _:
                files.ca.write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
        assert await ask(server.address, client) == REGISTRY_ID
        assert reloads("refused") > before
        assert "new TLS files refused, the old certificate stays" in caplog.messages
        good = reloads("ok")
        authority.leaf(REGISTRY_ID).write(folder, authority.pem)
        assert await ask(server.address, client) == REGISTRY_ID
        assert reloads("ok") == good + 1


def test_files_are_looked_at_no_more_often_than_asked(authority: Authority, tmp_path: Path) -> None:
    clock = [0.0]
    files = authority.leaf(REGISTRY_ID).write(tmp_path, authority.pem, reload_s=5)
    credentials = RotatingCredentials(files, monotonic=lambda: clock[0])
    authority.leaf(REGISTRY_ID, ends_in=timedelta(hours=9)).write(tmp_path, authority.pem)
    clock[0] = 4.9
    assert credentials.reload() is None
    clock[0] = 5.0
    renewed = credentials.reload()
    assert renewed is not None
    assert credentials.expires == renewed.expires
    clock[0] = 10.0
    assert credentials.reload() is None  # nothing new


def test_a_bad_certificate_stops_the_start(authority: Authority, tmp_path: Path) -> None:
    files = authority.expired(REGISTRY_ID).write(tmp_path, authority.pem)
    with pytest.raises(ConfigError, match="not now"):
        RotatingCredentials(files)
    files.cert.unlink()
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        RotatingCredentials(files)
    with pytest.raises(ConfigError, match=r"TLS file .*nowhere"):
        ClientTls(ca=tmp_path / "nowhere").credentials()


def test_expiry_is_an_alarm_to_watch(authority: Authority, tmp_path: Path) -> None:
    credentials = RotatingCredentials(authority.leaf(REGISTRY_ID).write(tmp_path, authority.pem))
    metric = REGISTRY.get_sample_value("mlmesh_tls_certificate_expiry_timestamp_seconds")
    assert metric == credentials.expires.timestamp()
