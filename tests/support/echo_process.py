"""The echo service as a process; the arguments `crash` and `slow-start` make its main fail or never
finish; `client ADDRESS` makes it a client instead."""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import Server, run
from tests.support.echo import PROTOS, Text, echo_service


async def main(settings: Settings) -> None:
    """Serve until told to stop."""
    if "crash" in sys.argv:
        raise RuntimeError("as asked")
    async with Server(settings, [echo_service()]) as server:
        if "slow-start" in sys.argv:
            await asyncio.Event().wait()
        await server.serve_until_signal()


async def client(address: str) -> None:
    """Open a stream, send one message and stay."""
    async with open_channel(address) as channel:
        stream = PROTOS.stub(channel).Chat(timeout=600)
        await stream.write(Text(text="here"))
        await asyncio.Event().wait()


if __name__ == "__main__":
    if "client" in sys.argv:
        asyncio.run(client(sys.argv[-1]))
    run(main, service="echo")
