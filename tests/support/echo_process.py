"""The echo service as a process; the arguments `crash` and `slow-start` make its main fail or never finish."""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import Server, run

from tests.support.echo import echo_service


async def main(settings: Settings) -> None:
    """Serve until told to stop."""
    if "crash" in sys.argv:
        raise RuntimeError("as asked")
    async with Server(settings, [echo_service()]) as server:
        if "slow-start" in sys.argv:
            await asyncio.Event().wait()
        await server.serve_until_signal()


if __name__ == "__main__":
    run(main, service="echo")
