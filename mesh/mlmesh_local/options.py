"""What a supervisor is started with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

GATEWAY_ADDRESS = "127.0.0.1:8443"
NOTHING = Path("none")
ControlPlane = Literal["mlmesh", "istiod"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``python -m mlmesh_local``.

    ``manifests`` and ``istio`` are YAML files or folders of them. ``gateway_address`` is HOST:PORT (port 0: a free one)
    or "none". ``control_plane`` "istiod" runs Istio's pilot-discovery in the place of ours: the program ``istiod``, or
    that of MLMESH_ISTIOD, or the one on PATH. ``startup_fd`` is a file descriptor that gets progress as JSON lines
    until the mesh is ready; -1: none. ``otlp_endpoint`` is where spans go besides the laptop's own store:
    "http://host:port" of an OTLP gRPC collector, or https. ``spiffe_socket`` is the address of a SPIFFE Workload API
    ("unix:///path") that issues identities in the place of the mesh's own authority; empty: none.
    """

    state_dir: Path = Path(".mlmesh")
    manifests: tuple[Path, ...] = (Path("manifests/base"),)
    istio: tuple[Path, ...] = (Path("mesh/istio"),)
    gateway_address: str = GATEWAY_ADDRESS
    log_level: str = "info"
    startup_fd: int = -1
    control_plane: ControlPlane = "mlmesh"
    istiod: str = ""
    otlp_endpoint: str = ""
    spiffe_socket: str = ""

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        words = ["--state-dir", str(self.state_dir), "--gateway-address", self.gateway_address]
        words += ["--log-level", self.log_level, "--startup-fd", str(self.startup_fd)]
        words += ["--control-plane", self.control_plane, "--istiod", self.istiod]
        words += ["--otlp-endpoint", self.otlp_endpoint, "--spiffe-socket", self.spiffe_socket]
        for path in self.manifests:
            words += ["--manifests", str(path)]
        for path in self.istio or (NOTHING,):
            words += ["--istio", str(path)]
        return words


def parse(arguments: Sequence[str]) -> Options:
    """Options from a command line; exits with a message on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python -m mlmesh_local", description="Runs the laptop mesh in the foreground; `mlmesh up` starts it."
    )
    default = Options()
    parser.add_argument("--state-dir", type=Path, default=default.state_dir, help="folder for sockets, logs and data")
    parser.add_argument("--manifests", type=Path, action="append", help="Kubernetes YAML: a file or a folder")
    parser.add_argument("--istio", type=Path, action="append", help="Istio YAML: a file or a folder, or none")
    parser.add_argument(
        "--gateway-address",
        default=default.gateway_address,
        help="where the ingress gateway listens for callers outside the mesh: HOST:PORT, or none",
    )
    parser.add_argument("--log-level", default=default.log_level, choices=["debug", "info", "warning", "error"])
    parser.add_argument(
        "--control-plane", default=default.control_plane, choices=get_args(ControlPlane), help="ours, or Istio's own"
    )
    parser.add_argument("--istiod", default="", help="pilot-discovery, the program of Istio's control plane")
    parser.add_argument("--otlp-endpoint", default="", help="where spans go besides the laptop's own store")
    parser.add_argument(
        "--spiffe-socket", default="", help="SPIFFE Workload API that issues identities, such as SPIRE's"
    )
    parser.add_argument("--startup-fd", type=int, default=-1, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    return Options(
        state_dir=found.state_dir,
        manifests=tuple(found.manifests or default.manifests),
        istio=tuple(path for path in found.istio or default.istio if path != NOTHING),
        gateway_address=found.gateway_address,
        log_level=found.log_level,
        startup_fd=found.startup_fd,
        control_plane=found.control_plane,
        istiod=found.istiod,
        otlp_endpoint=found.otlp_endpoint,
        spiffe_socket=found.spiffe_socket,
    )
