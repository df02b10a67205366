"""A workload for tests of the laptop mesh: ``python -m tests.support.echo_app`` as the command of a Deployment.

Every answer's text is JSON: which pod answered, who called (by the sidecar), and what was asked. A request that says
``fail`` is refused with UNAVAILABLE, which the mesh retries. ECHO_EXIT ends the process at once, with that code.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from mlmesh_runtime.config import Settings
from mlmesh_runtime.errors import NotReady
from mlmesh_runtime.identity import current_identity
from mlmesh_runtime.server import Server, run
from tests.support.echo import EchoServicer, Text, echo_service


class PodServicer(EchoServicer):
    """Tells which pod answered."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._pod = settings.pod_name

    async def Unary(self, request: Any, _context: Any) -> Any:
        return self._answer(request)

    async def Chat(self, requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield self._answer(request)

    def _answer(self, request: Any) -> Any:
        if request.text == "fail":
            raise NotReady("asked to fail")
        text = {"pod": self._pod, "identity": current_identity(), "asked": request.text}
        return Text(text=json.dumps(text), count=request.count)


async def main(settings: Settings) -> None:
    async with Server(settings, [echo_service(PodServicer(settings))]) as server:
        await server.serve_until_signal()


if __name__ == "__main__":
    if code := os.environ.get("ECHO_EXIT"):
        sys.stderr.write("told to exit\n")
        sys.exit(int(code))
    run(main, service="echo")
