"""How many rows a second an engine does with no server around it: ceiling.py MODEL BATCH SECONDS ENGINE."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers import models


def main() -> None:
    """Two threads, each with a session of one thread, run batches for a time."""
    from mlmesh_inference.engines.base import EngineOptions
    from mlmesh_inference.engines.onnx import OnnxKind

    path, batch, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    inputs = {name: array for name, _, array in models.inputs(path.stem, batch)}
    engine = OnnxKind().build(path, EngineOptions(threads=1, concurrency=2, rows_max=64, rows_preferred=batch))
    outputs = [spec.name for spec in engine.signature.outputs]
    counts = [0, 0]
    engine.run(inputs, outputs)
    until = time.perf_counter() + seconds

    def work(place: int) -> None:
        while time.perf_counter() < until:
            engine.run(inputs, outputs)
            counts[place] += batch

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"rows_per_s": sum(counts) / (time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
