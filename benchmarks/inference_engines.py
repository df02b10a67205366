"""Which engine is fastest for which model on this machine, how far its answers are off, and what memory it takes.

Every engine and precision runs in a process of its own, loads the model, and answers batches of 1 to 64 rows on as many
threads as there are cores, one thread of computing each. Rounds of all of them alternate. Rates are rows a second;
ratios are to ONNX Runtime in FP32 of the same round. The error is the largest difference from ONNX Runtime in FP32,
absolute and relative to the reference's largest magnitude. Memory is what the process grew by (RssAnon), libraries
included, from before the engine's import.

Then the policy itself chooses, in the way the server does, with FP32 and with BF16 declared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import engine_models, harness

RESULTS = Path("benchmarks/results")
ENGINES = (
    ("onnxruntime-cpu", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("torch", "fp32"),
    ("torch", "bf16"),
)
COMPILED = (("torch-compiled", "fp32"), ("torch-compiled", "bf16"))
ROWS = (1, 2, 4, 8, 16, 32, 64)
LENGTH = 32
REFERENCE = "onnxruntime-cpu fp32"


def serve_rounds(model: str, engine: str, precision: str, instances: int) -> None:
    """The child: says what it took to load, then answers "ROWS SECONDS" lines with a rate."""
    from mlmesh_inference.engines.base import EngineOptions
    from mlmesh_inference.engines.graph import read_graph
    from mlmesh_inference.engines.kinds import engine_kinds
    from mlmesh_inference.engines.memory import resident_bytes
    from mlmesh_inference.engines.samples import Samples

    before = resident_bytes()
    kind = next(each for each in engine_kinds() if each.name == engine)
    if not kind.probe().available:
        print(json.dumps({"absent": kind.probe().reason}), flush=True)
        return
    graph = read_graph(Path(model))
    begun = time.perf_counter()
    built = kind.build(Path(model), EngineOptions(concurrency=instances, precision=precision))
    load_s = time.perf_counter() - begun
    samples = Samples(built.signature, graph, batches=True)
    names = [spec.name for spec in built.signature.outputs]
    first = built.run(samples.make(8, LENGTH), names)
    said = {
        "precision": built.facts.precision,
        "load_s": round(load_s, 3),
        "memory_mib": round((resident_bytes() - before) / 2**20, 1),
        "version": kind.probe().version,
        "answer": first[0].astype(float).tolist(),
    }
    print(json.dumps(said), flush=True)
    for line in sys.stdin:
        rows, seconds = int(line.split()[0]), float(line.split()[1])
        inputs, counts = samples.make(rows, LENGTH), [0] * instances
        until = time.perf_counter() + seconds

        def work(place: int) -> None:
            while time.perf_counter() < until:  # noqa: B023
                built.run(inputs, names)  # noqa: B023
                counts[place] += 1  # noqa: B023

        began = time.perf_counter()
        threads = [threading.Thread(target=work, args=(place,)) for place in range(instances)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps(sum(counts) * rows / (time.perf_counter() - began)), flush=True)
    os._exit(0)


class Child:
    """One engine in a process of its own."""

    def __init__(self, model: Path, engine: str, precision: str, instances: int) -> None:
        command = (sys.executable, "-m", "benchmarks.inference_engines", "--child", str(model), engine, precision)
        self.process = subprocess.Popen(
            [*command, str(instances)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.said: dict[str, Any] = json.loads(self._line() or '{"absent": "it died"}')

    def rate(self, rows: int, seconds: float) -> float:
        """Rows a second."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rows} {seconds}\n")
        self.process.stdin.flush()
        return float(json.loads(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def compare(model: Path, engines: Sequence[tuple[str, str]], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Facts and rates of every engine, rounds interleaved and shuffled, the first thrown away."""
    instances = len(os.sched_getaffinity(0))
    children = {f"{engine} {precision}": Child(model, engine, precision, instances) for engine, precision in engines}
    present = {name: child for name, child in children.items() if "absent" not in child.said}
    absent = {name: child.said["absent"] for name, child in children.items() if name not in present}
    rates: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in present}
    order = list(present)
    for number in range(rounds + 1):
        for rows in ROWS:
            random.Random(number * 100 + rows).shuffle(order)  # noqa: S311
            for name in order:
                rate = present[name].rate(rows, seconds)
                if number:
                    rates[name][rows].append(rate)
    expected = np.array(present[REFERENCE].said["answer"])
    found = {}
    for name, child in present.items():
        error = float(np.abs(np.array(child.said.pop("answer")) - expected).max())
        found[name] = {
            **child.said,
            "error_absolute": error,
            "error_relative": error / float(np.abs(expected).max()),
            "rows_per_s": {rows: round(statistics.median(values), 1) for rows, values in rates[name].items()},
            "ratio": {
                rows: round(harness.ratio_of_medians(values, rates[REFERENCE][rows]), 3)
                for rows, values in rates[name].items()
            },
        }
        child.close()
    return {"instances": instances, "engines": found, "absent": absent}


async def choice(model: Path, precision: str) -> dict[str, Any]:
    """What the policy chooses, as the server has it tried."""
    from mlmesh_inference.choosing import tuning_of
    from mlmesh_inference.engines.child import try_in_child
    from mlmesh_inference.engines.kinds import engine_kinds
    from mlmesh_inference.engines.selection import Wish, candidates, choose, chosen, why
    from mlmesh_inference.engines.trial import TrialOrder

    wish, kinds = Wish(precision=precision), engine_kinds()
    offered = candidates(kinds, {kind.name: kind.probe() for kind in kinds}, wish)
    cores = len(os.sched_getaffinity(0))
    begun = time.perf_counter()
    tried = await try_in_child(TrialOrder(model=model, candidates=offered.tried, concurrency=cores, lengths=(LENGTH,)))
    trials = choose(tried, wish, 8)
    winner, tuning = chosen(trials), tuning_of(trials)
    return {
        "chosen": f"{winner.engine} {winner.precision}" if winner else "",
        "why": why(trials),
        "rows": tuning.rows if tuning else 0,
        "instances": tuning.instances if tuning else 0,
        "batches": tuning.reason if tuning else "",
        "took_s": round(time.perf_counter() - begun, 1),
        "trials": [trial.to_json() for trial in trials],
    }


def table(name: str, result: Mapping[str, Any]) -> str:
    """For the README: rates by rows, ratio, error, memory."""
    heads = ["engine", "precision", *(f"{rows}" for rows in ROWS), "error (relative)", "MiB", "load s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for engine, found in result["engines"].items():
        cells = [f"{found['rows_per_s'][rows]:.0f} ({found['ratio'][rows]:.2f})" for rows in ROWS]
        error = f"{found['error_absolute']:.1e} ({found['error_relative']:.1e})"
        values = [
            engine.split()[0],
            found["precision"],
            *cells,
            error,
            f"{found['memory_mib']:.0f}",
            f"{found['load_s']:.1f}",
        ]
        lines.append("| " + " | ".join(values) + " |")
    return f"{name}: rows a second by rows of a batch (ratio to ONNX Runtime FP32)\n\n" + "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="inference-engines")
    parser.add_argument("--models", nargs="*", default=[engine_models.MNIST, engine_models.MINILM])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well; takes minutes")
    parser.add_argument("--folder", type=Path, default=RESULTS / "models")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name in options.models:
        path = engine_models.write(name, options.folder)
        engines = (*ENGINES, *(COMPILED if options.compiled else ()))
        result = compare(path, engines, rounds=options.rounds, seconds=options.seconds)
        result["auto"] = asyncio.run(choice(path, ""))
        result["bf16 declared"] = asyncio.run(choice(path, "bf16"))
        results[name] = result
        print(table(name, result))
        for said in ("auto", "bf16 declared"):
            print(f"\n{said}: {result[said]['chosen']}, {result[said]['batches']}")
        print()
    harness.write_results(RESULTS / "inference_engines.json", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve_rounds(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main(sys.argv[1:])
