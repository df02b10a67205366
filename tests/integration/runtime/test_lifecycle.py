"""Starting, draining and stopping: what callers see, in process and as a real process under signals."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlmesh_runtime.channel import mesh_error, open_channel
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.limits import Limits
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service
from tests.support.server import serving, spawn

pytestmark = pytest.mark.usefixtures("each_transport")

PEER = str(Path(__file__).parent.parent.parent / "support" / "echo_process.py")


async def test_draining_lets_open_calls_and_streams_finish() -> None:
    release = asyncio.Event()

    async def hold(request: Any) -> None:
        if request.text == "slow":
            await release.wait()

    async with (
        serving(echo_service(EchoServicer(hold))) as server,
        open_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        unary, stream = stub.Unary(Text(text="slow"), timeout=20), stub.Chat(timeout=20)
        await stream.write(Text(text="before"))
        assert (await stream.read()).text == "before"
        stopping = asyncio.ensure_future(server.stop(drain_s=0, grace_s=10))
        await server.draining.wait()
        await _refused_connection(server.address)
        await stream.write(Text(text="after"))
        assert (await stream.read()).text == "after"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        release.set()
        assert (await unary).text == "slow"
        async with asyncio.timeout(20):
            await stopping


async def _refused_connection(address: str) -> None:
    """Wait until the port is closed."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                return
            writer.close()
            await writer.wait_closed()


async def test_while_draining_health_says_no_and_calls_are_answered() -> None:
    async with serving(echo_service()) as server, open_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        stopping = asyncio.ensure_future(server.stop(drain_s=30, grace_s=1))
        await server.draining.wait()
        for name in ("", "test.echo.Echo"):
            status = (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
            assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await PROTOS.stub(channel).Unary(Text(text="still"))).text == "still"
        server._hurry.set()  # what a second signal does
        async with asyncio.timeout(20):
            await stopping


async def test_watches_are_ended_so_that_they_go_elsewhere() -> None:
    async def forever(_: Any) -> None:
        await asyncio.Event().wait()

    async with serving(echo_service(EchoServicer(forever))) as server, open_channel(server.address) as channel:
        watch = PROTOS.stub(channel).Watch(Text(text="w"))
        assert (await watch.read()).text == "w"
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(server.stop(grace_s=60))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert mesh_error(caught.value).reason == "DRAINING"


async def test_after_the_grace_calls_are_cancelled_and_cleaned_up() -> None:
    cleaned = asyncio.Event()

    class Holding(EchoServicer):
        async def Expand(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
            try:
                yield Text(text="first")
                await asyncio.Event().wait()
            finally:
                cleaned.set()

    async with serving(echo_service(Holding())) as server, open_channel(server.address) as channel:
        call = PROTOS.stub(channel).Expand(Text(), timeout=30)
        await call.read()
        async with asyncio.timeout(20):
            await server.stop(grace_s=0.05)
            await cleaned.wait()
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_callbacks_run_before_the_port_closes_and_stop_is_once() -> None:
    order: list[str] = []

    async def later() -> None:
        order.append("async")

    async with serving(echo_service()) as server:
        server.on_drain(lambda: order.append("sync"))
        server.on_drain(later)
        await asyncio.gather(server.stop(), server.stop())
    assert order == ["sync", "async"]


async def test_a_port_is_taken_once() -> None:
    async with serving(echo_service()) as server:
        with pytest.raises(ConfigError, match=r"MLMESH_LISTEN: cannot listen on 127\.0\.0\.1:\d+: is the port"):
            async with serving(echo_service(), listen=server.address):
                pass
        with pytest.raises(ConfigError, match="MLMESH_METRICS_LISTEN"):
            async with serving(echo_service(), metrics_listen=server.address):
                pass


async def test_a_unix_socket_is_private(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with serving(echo_service(), listen=f"unix:{path}") as server:
        assert server.address == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o600
        async with open_channel(server.address) as channel:
            assert (await PROTOS.stub(channel).Unary(Text(text="local"))).text == "local"


async def test_outbound_host_is_dialled_with_the_target_as_authority() -> None:
    async with serving(echo_service()) as server:
        port = server.address.rpartition(":")[2]
        target = f"registry.mlmesh.svc.cluster.local:{port}"
        async with open_channel(target, outbound_host="127.0.0.1") as channel:
            assert (await PROTOS.stub(channel).Unary(Text(text="through"))).text == "through"
    with pytest.raises(ConfigError, match="expected host:port"):
        open_channel("no-port")


async def test_sigterm_drains_a_process_and_it_ends_with_zero() -> None:
    with spawn(PEER, env={"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_GRACE_S": "10"}) as process:
        address = await asyncio.to_thread(process.listening)
        async with open_channel(address) as channel:
            stub = PROTOS.stub(channel)
            stream = stub.Chat(timeout=20)
            await stream.write(Text(text="one"))
            assert (await stream.read()).text == "one"
            process.signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait_for, lambda entry: entry["event"] == "stopping")
            await stream.write(Text(text="two"))
            assert (await stream.read()).text == "two"
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        assert await asyncio.to_thread(process.wait) == 0
    assert '"event": "stopped"' in process.log()


async def test_a_second_signal_does_not_wait() -> None:
    with spawn(PEER, env={"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_DRAIN_S": "600"}) as process:
        await asyncio.to_thread(process.listening)
        process.signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait_for, lambda entry: entry["event"] == "stopping")
        process.signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait) == 0


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"MLMESH_DRAIN_S": "soon"}, "echo: bad configuration: MLMESH_DRAIN_S: expected a number; got 'soon'"),
        (
            {"MLMESH_LISTEN": "256.0.0.1:1"},
            "echo: bad configuration: MLMESH_LISTEN: cannot listen on 256.0.0.1:1",
        ),
        (
            {"MLMESH_TLS_CERT": "/nowhere/c", "MLMESH_TLS_KEY": "/nowhere/k", "MLMESH_TLS_CA": "/nowhere/a"},
            "echo: bad configuration: TLS files /nowhere/c",
        ),
    ],
)
async def test_a_bad_configuration_is_one_clear_line(env: dict[str, str], line: str) -> None:
    with spawn(PEER, env={"MLMESH_LISTEN": "127.0.0.1:0", **env}) as process:
        assert await asyncio.to_thread(process.wait) == 2
    ours = [entry for entry in process.lines if "bad configuration" in entry]
    assert len(ours) == 1
    assert ours[0].startswith(line)
    assert "Traceback" not in process.log()


async def test_a_failing_main_is_logged_and_ends_with_one() -> None:
    with spawn(PEER, "crash", env={"MLMESH_LISTEN": "127.0.0.1:0"}) as process:
        assert await asyncio.to_thread(process.wait) == 1
    entry = process.wait_for(lambda entry: entry["event"] == "the process failed")
    assert entry["service"] == "echo"
    assert "RuntimeError" in entry["exception"]


async def test_a_hung_peer_is_noticed() -> None:
    """A stopped process keeps its connection open and answers nothing; only pings tell."""
    limits = Limits(keepalive_time_s=0.5, keepalive_timeout_s=0.5)
    with spawn(PEER, env={"MLMESH_LISTEN": "127.0.0.1:0"}) as process:
        address = await asyncio.to_thread(process.listening)
        async with open_channel(address, limits=limits) as channel:
            stub = PROTOS.stub(channel)
            await stub.Unary(Text(text="up"))
            process.signal(signal.SIGSTOP)
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Unary(Text(text="anyone there?"), timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert loop.time() - began < 10


def test_python_is_the_one_of_the_tests() -> None:
    with spawn("-c", "import sys; sys.stderr.write(sys.executable)") as process:
        assert process.wait() == 0
    assert process.log() == sys.executable


async def test_a_signal_while_starting_ends_the_process_at_once() -> None:
    with spawn(PEER, "slow-start", env={"MLMESH_LISTEN": "127.0.0.1:0"}) as process:
        await asyncio.to_thread(process.listening)
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
    assert "Traceback" not in process.log()


async def test_a_hung_client_is_noticed_by_the_server() -> None:
    """Its stream would otherwise hold its place until the deadline."""
    begun, ended = asyncio.Event(), asyncio.Event()

    class Holding(EchoServicer):
        async def Chat(self, requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
            try:
                async for request in requests:
                    begun.set()
                    yield request
            finally:
                ended.set()

    limits = Limits(keepalive_time_s=0.5, keepalive_timeout_s=0.5)
    async with serving(echo_service(Holding()), limits=limits) as server:
        with spawn(PEER, "client", server.address) as client:
            async with asyncio.timeout(30):
                await begun.wait()
                client.signal(signal.SIGSTOP)
                loop = asyncio.get_running_loop()
                at = loop.time()
                await ended.wait()
                assert loop.time() - at < 10
