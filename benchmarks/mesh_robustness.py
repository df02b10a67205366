"""Does anything fail while a mesh changes? A thousand route changes and fifty rotations under load, policies by turns.

    python -m benchmarks mesh-robustness --changes 1000 --rotations 50 --policies 500

Real Envoys, mutual TLS: unary calls and messages on streams that stay open go on without pause while weights and
certificates change; every failure is counted. Then a policy denies and allows by turns: after each acknowledgement
calls are made on connections that were open before, and a call that the old policy decided is counted as wrong.
A tenth of it runs with the tests, `tests/robustness/mesh`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import write_results
from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service
from tests.support.mesh_proofs import change_routes, switch_policy

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1", replicas=2)
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    at = {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 90, 99)}
    return {name: round(value * 1000, 2) for name, value in {**at, "max": ordered[-1]}.items()}


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both proofs."""
    with tempfile.TemporaryDirectory(prefix="mlmesh-proof-") as folder:
        async with EnvoyMesh.start(Path(folder), WORKLOADS, STRICT + SUBSETS) as mesh:
            began = time.perf_counter()
            routes = await change_routes(mesh, changes=arguments.changes, rotations=arguments.rotations)
            routes_s = time.perf_counter() - began
            began = time.perf_counter()
            policies = await switch_policy(mesh, rounds=arguments.policies)
            policies_s = time.perf_counter() - began
    return {
        "route changes": routes.changes,
        "rotations": routes.rotations,
        "unary calls": routes.unary,
        "stream messages": routes.messages,
        "failures": routes.failures[:20],
        "failed": len(routes.failures),
        "apply to acknowledged, ms": percentiles(routes.ack_s),
        "routes, s": round(routes_s, 1),
        "policy changes": len(policies.ack_s),
        "calls after acknowledgement": policies.calls,
        "decided by the old policy": len(policies.wrong),
        "policy to acknowledged, ms": percentiles(policies.ack_s),
        "mean ack, ms": round(statistics.mean(policies.ack_s) * 1000, 2),
        "policies, s": round(policies_s, 1),
    }


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m benchmarks mesh-robustness`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks mesh-robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--rotations", type=int, default=50)
    parser.add_argument("--policies", type=int, default=500, help="rounds of deny and allow")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mesh_robustness.json"))
    chosen = parser.parse_args(arguments)
    result = asyncio.run(run(chosen))
    for name, value in result.items():
        Console().print(f"{name:28} {value}")
    write_results(chosen.out, result)
    print(f"written to {chosen.out}")
    if result["failed"] or result["decided by the old policy"]:
        sys.exit(1)
