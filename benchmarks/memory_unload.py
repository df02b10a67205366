"""Whether memory comes back: MiniLM is loaded, used with many shapes and unloaded, ten times, in the server's own way.

Resident memory is written down after each load, after batches of random sizes, and after each unload. A second run
does the same without giving free pages back to the system (no malloc_trim), to show what that is for. A third figure is
memory over hundreds of batches of ever new shapes on one loaded model. Writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import engine_models, harness

RESULTS = Path("benchmarks/results")
MIB = 1 << 20


def cycles(model: str, engine: str, count: int, batches: int, *, gives_back: bool) -> None:
    """The child: loads, works, unloads; prints what it measured."""
    from mlmesh_inference.engines import memory
    from mlmesh_inference.engines.base import EngineOptions
    from mlmesh_inference.engines.kinds import engine_kinds

    kind = next(each for each in engine_kinds() if each.name == engine)
    if not gives_back:
        memory._trim = lambda: None  # type: ignore[assignment]
    options = EngineOptions(concurrency=2)
    warm = kind.build(Path(model), options)  # what the library itself takes is not the model's
    warm.close()
    del warm
    random, found = np.random.default_rng(0), []
    base = resident()
    for _ in range(count):
        built = kind.build(Path(model), options)
        loaded = resident()
        for _ in range(batches):
            built.run(request(random), ["embedding"])
        worked = resident()
        built.close()
        del built
        found.append({"loaded": loaded, "worked": worked, "unloaded": resident()})
    print(json.dumps({"base": base, "cycles": found}))
    sys.stdout.flush()
    os._exit(0)


def shapes(model: str, engine: str, batches: int) -> None:
    """The child: one model, ever new shapes; prints memory every so often."""
    from mlmesh_inference.engines.base import EngineOptions
    from mlmesh_inference.engines.kinds import engine_kinds

    kind = next(each for each in engine_kinds() if each.name == engine)
    built = kind.build(Path(model), EngineOptions(concurrency=2))
    random, found = np.random.default_rng(1), []
    for number in range(batches):
        built.run(request(random), ["embedding"])
        if number % 10 == 9:
            found.append([number + 1, resident()])
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def request(random: np.random.Generator) -> dict[str, np.ndarray]:
    """A batch of 1 to 8 texts of 4 to 96 tokens."""
    shape = (int(random.integers(1, 9)), int(random.integers(4, 97)))
    return {"input_ids": random.integers(0, 30_000, shape), "attention_mask": np.ones(shape, np.int64)}


def resident() -> int:
    """RssAnon in MiB."""
    from mlmesh_inference.engines.memory import resident_bytes

    return resident_bytes() // MIB


def child(*arguments: str) -> Any:
    """What a child process prints."""
    command = [sys.executable, "-m", "benchmarks.memory_unload", "--child", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def plot(results: dict[str, Any], path: Path) -> None:
    """Two panels: cycles of load and unload, and memory over shapes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, style in (("onnxruntime-cpu", "-"), ("openvino", "-"), ("onnxruntime-cpu, nothing given back", "--")):
        if name not in results["cycles"]:
            continue
        found = results["cycles"][name]
        values = [found["base"]]
        for each in found["cycles"]:
            values += [each["loaded"], each["worked"], each["unloaded"]]
        left.plot([place / 3 for place in range(len(values))], values, style, label=name)
    left.set(xlabel="loads and unloads of MiniLM", ylabel="resident memory, MiB", ylim=0)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    for name, values in results["shapes"].items():
        right.plot([number for number, _ in values], [size for _, size in values], label=name)
    right.set(xlabel="batches, each of another shape", ylabel="resident memory, MiB", ylim=0)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="memory-unload")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--shapes", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=RESULTS / "models")
    options = parser.parse_args(arguments)
    model = str(engine_models.write(engine_models.MINILM, options.folder))
    counts = (str(options.cycles), str(options.batches))
    results: dict[str, Any] = {"cycles": {}, "shapes": {}}
    for engine in ("onnxruntime-cpu", "openvino"):
        results["cycles"][engine] = child("cycles", model, engine, *counts, "1")
        results["shapes"][engine] = child("shapes", model, engine, str(options.shapes))
    results["cycles"]["onnxruntime-cpu, nothing given back"] = child("cycles", model, "onnxruntime-cpu", *counts, "0")
    for name, found in results["cycles"].items():
        last, most = found["cycles"][-1]["unloaded"], max(each["worked"] for each in found["cycles"])
        print(f"{name}: before {found['base']} MiB, at most {most} MiB, after the last unload {last} MiB")
    for name, values in results["shapes"].items():
        half = values[len(values) // 2][1]
        print(f"{name}: after half of the shapes {half} MiB, after all {values[-1][1]} MiB")
    harness.write_results(RESULTS / "memory_unload.json", results)
    plot(results, RESULTS / "memory_unload.png")


if __name__ == "__main__":
    if sys.argv[1:3] == ["--child", "cycles"]:
        cycles(sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]), gives_back=sys.argv[7] == "1")
    elif sys.argv[1:3] == ["--child", "shapes"]:
        shapes(sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main(sys.argv[1:])
