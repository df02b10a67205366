"""`python -m benchmarks [NAME] [OPTIONS]`: runs one benchmark, or all with their defaults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from benchmarks import (
    inference_engines,
    inference_limits,
    inference_overload,
    inference_path,
    inference_scheduler,
    inference_soak,
    memory_unload,
    mesh_metrics,
    mesh_overhead,
    mesh_robustness,
    mesh_scale,
    paths,
    registry_search,
    registry_transfer,
    registry_watch,
    registry_write,
    training_ddp,
    transports,
)
from benchmarks.peers import run as peers

RESULTS = Path("benchmarks/results")


def runtime_overhead(arguments: list[str]) -> None:
    """The runtime against a bare gRPC server; prints JSON."""
    script = Path(__file__).with_name("runtime_overhead.py")
    done = subprocess.run([sys.executable, str(script), *arguments], check=True, stdout=subprocess.PIPE, text=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "runtime_overhead.json").write_text(done.stdout)
    print(done.stdout)


BENCHMARKS = {"paths": paths.main, "runtime": runtime_overhead, "registry-search": registry_search.main}
BENCHMARKS |= {"registry-watch": registry_watch.main, "registry-write": registry_write.main}
BENCHMARKS |= {"registry-transfer": registry_transfer.main}
BENCHMARKS |= {"training-ddp": training_ddp.main, "peers": peers.main}
BENCHMARKS |= {"inference-path": inference_path.main, "inference-soak": inference_soak.main}
BENCHMARKS |= {"inference-scheduler": inference_scheduler.main, "inference-limits": inference_limits.main}
BENCHMARKS |= {"inference-overload": inference_overload.main}
BENCHMARKS |= {"transports": transports.main, "mesh-metrics": mesh_metrics.main}
BENCHMARKS |= {"inference-engines": inference_engines.main, "memory-unload": memory_unload.main}
BENCHMARKS |= {"mesh-scale": mesh_scale.main, "mesh-overhead": mesh_overhead.main}
BENCHMARKS |= {"mesh-robustness": mesh_robustness.main}


def main() -> None:
    """Runs what was named."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    name, *arguments = sys.argv[1:] or ["all"]
    if name != "all" and name not in BENCHMARKS:
        sys.exit(f"usage: python -m benchmarks [{'|'.join(BENCHMARKS)}|all] [OPTIONS]")
    try:
        for run in BENCHMARKS.values() if name == "all" else [BENCHMARKS[name]]:
            run(arguments)
    except typer.Exit as ended:
        # The problem was told already.
        sys.exit(ended.exit_code)


if __name__ == "__main__":
    main()
