"""Istio's control plane as a child process."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

from mlmesh_local.istiod.process import Istiod
from tests.support import tools


async def test_a_port_that_somebody_took_meanwhile_is_exchanged(tmp_path: Path) -> None:
    istiod = Istiod(tools.require("pilot-discovery"), tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        istiod.ports = dataclasses.replace(istiod.ports, xds=port)
        await istiod.start()
    try:
        assert istiod.address != f"127.0.0.1:{port}"
        assert "address already in use" in istiod.log.read_text()
    finally:
        await istiod.stop()
