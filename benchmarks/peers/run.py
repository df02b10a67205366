"""Who serves faster? mlmesh beside Triton, KServe, MLServer, TorchServe and LitServe, all up at once, in turns.

    python -m benchmarks peers --rounds 5 --seconds 1.5 --peers triton,kserve --out benchmarks/results/peers.json

Every round measures every server with every load, in shuffled order, so that a slow moment of the machine meets all of
them; ratios are medians over the rounds' ratios. What is measured: answers a second, p50 and p99 of the client, and CPU
time of the server's process tree a message. Servers run the same ONNX files with the same engine (ONNX Runtime, FP32,
two threads in all), each with its best settings known to us. Needs cargo for the load generator; a server that cannot
be installed or started here is left out, and the reason is told.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ratio_of_medians, write_results
from benchmarks.peers import load, models, ours, servers
from benchmarks.peers.load import Measured, Shape, unary
from benchmarks.peers.servers import Started, Unavailable

SHAPES: Final = (
    unary(models.TINY, 1),
    unary(models.TINY, 16),
    unary(models.TINY, 64),
    Shape(model=models.TINY, mode="stream", streams=1, in_flight=32),
    Shape(model=models.TINY, mode="stream", streams=8, in_flight=8),
    unary(models.MINILM, 16),
    unary(models.MINILM, 64),
)
NATIVE, GRPCIO = "mlmesh, native", "mlmesh, grpcio"
BASELINE: Final = "Triton"

Rounds = dict[tuple[str, str], list[Measured]]


def native_transport() -> bool:
    """Whether the native transport is built."""
    try:
        import mlmesh_front  # noqa: F401
    except ImportError:
        return False
    return True


class Suite:
    """Servers that are up, what was left out and why, and what was measured."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: list[Started] = []
        self.absent: dict[str, str] = {}
        self.rounds: Rounds = {}
        self.ceilings: dict[int, list[float]] = {}

    def start(self, stack: contextlib.ExitStack, folder: Path, chosen: Sequence[str], *, mesh: bool) -> None:
        """Start what was chosen; what cannot be started is noted."""
        files = {name: path.resolve() for name, path in models.write(servers.BUILD / "models").items()}
        for peer in servers.PEERS:
            if peer.name in chosen:
                (folder / peer.name).mkdir()
                self._add(stack, peer.name, lambda peer=peer: peer.start(folder / peer.name, files))
        address = stack.enter_context(ours.registry(folder, files))
        transports = [(GRPCIO, "grpcio")]
        if native_transport():
            transports.append((NATIVE, "native"))
        else:
            self.absent[NATIVE] = "the native transport is not built: make front"
        for name, transport in transports:
            self._add(stack, name, lambda t=transport, n=name: ours.server(folder / t, address, t, name=n))
        if mesh:
            transport = transports[-1][1]
            self._add(stack, "mesh", lambda: ours.mesh(folder / "mesh", files, transport))

    def _add(self, stack: contextlib.ExitStack, name: str, start: Any) -> None:
        self.console.print(f"starting {name}")
        try:
            self.started.append(stack.enter_context(start()))
            if self.started[-1].spins:
                servers.halt(self.started[-1], go_on=False)
        except Unavailable as error:
            self.absent[name] = str(error)
            self.console.print(f"  left out: {error}")

    def measure(self, folder: Path, *, rounds: int, seconds: float, seed: int) -> None:
        """All servers with all loads, in shuffled turns; the first round warms up and is not counted."""
        client, shuffle = load.build_client(), random.Random(seed).shuffle  # noqa: S311
        minilm = servers.BUILD / "models" / f"{models.MINILM}.onnx"
        work = [(started, shape) for started in self.started for shape in SHAPES if _offered(started, shape)]
        for number in range(rounds + 1):
            shuffle(work)
            for started, shape in work:
                if started.spins:
                    servers.halt(started, go_on=True)
                try:
                    result = load.measure(started, shape, client, folder / "body", seconds=seconds if number else 0.4)
                except RuntimeError as error:
                    # A figure with failures is not a figure; the others still are.
                    self.absent[f"{started.name}, {shape.name}"] = str(error)[:300]
                    continue
                finally:
                    if started.spins:
                        servers.halt(started, go_on=False)
                if number:
                    self.rounds.setdefault((started.name, shape.name), []).append(result)
            if number:
                for batch in (1, 8):
                    rate = ours.ceiling(minilm.resolve(), batch=batch, seconds=seconds)
                    self.ceilings.setdefault(batch, []).append(rate)
            self.console.print(f"round {number} of {rounds}")

    def summary(self) -> dict[str, Any]:
        """Medians, ratios to Triton of the same round, and shares of the engine's own speed."""
        result: dict[str, Any] = {}
        ceiling = [max(pair) for pair in zip(*self.ceilings.values(), strict=True)] if self.ceilings else []
        for (server, shape), measured in sorted(self.rounds.items()):
            row = {
                "per_s": round(statistics.median(each.per_s for each in measured), 1),
                "p50_us": round(statistics.median(each.p50_us for each in measured)),
                "p99_us": round(statistics.median(each.p99_us for each in measured)),
                "cpu_us": round(statistics.median(each.cpu_us for each in measured), 1),
            }
            base = self.rounds.get((BASELINE, shape))
            if base and len(base) == len(measured):
                for key in ("per_s", "p50_us", "cpu_us"):
                    values = [getattr(each, key) for each in measured]
                    row[f"{key}_to_triton"] = round(ratio_of_medians(values, [getattr(each, key) for each in base]), 2)
            if shape.startswith(models.MINILM) and len(ceiling) == len(measured):
                row["share_of_engine"] = round(ratio_of_medians([each.per_s for each in measured], ceiling), 3)
            result.setdefault(shape, {})[server] = row
        return result


def _offered(started: Started, shape: Shape) -> bool:
    return shape.mode == "unary" or started.streams


def show(summary: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """One table."""
    table = Table("load", "server", title="medians over the rounds; CPU is the server's process tree, a message")
    for column in ("answers/s", ": Triton", "p50", ": Triton", "p99", "CPU", ": Triton", "of the engine"):
        table.add_column(column, justify="right")
    for shape in SHAPES:
        rows = summary.get(shape.name, {})
        for server, row in sorted(rows.items(), key=lambda pair: -pair[1]["per_s"]):
            table.add_row(
                shape.name,
                server,
                f"{row['per_s']:,.0f}",
                f"{row.get('per_s_to_triton', '-')}",
                f"{row['p50_us'] / 1000:.2f} ms",
                f"{row.get('p50_us_to_triton', '-')}",
                f"{row['p99_us'] / 1000:.2f} ms",
                f"{row['cpu_us']:,.0f} µs",
                f"{row.get('cpu_us_to_triton', '-')}",
                f"{row.get('share_of_engine', '')}",
            )
        table.add_section()
    console.print(table)


def plot(summary: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Answers a second and CPU a message, by load and server, on logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({server for rows in summary.values() for server in rows})
    shapes = [shape.name for shape in SHAPES if shape.name in summary]
    colours = pyplot.get_cmap("tab10")
    figure, axes = pyplot.subplots(2, 1, figsize=(12, 9), constrained_layout=True)
    for axis, key, title in (
        (axes[0], "per_s", "answers a second (more is better)"),
        (axes[1], "cpu_us", "server CPU a message, µs (less is better)"),
    ):
        width = 0.85 / max(1, len(names))
        for place, name in enumerate(names):
            bars = [(at, summary[shape][name][key]) for at, shape in enumerate(shapes) if name in summary[shape]]
            axis.bar(
                [at + (place - (len(names) - 1) / 2) * width for at, _ in bars],
                [value for _, value in bars],
                width,
                label=name,
                color=colours(place % 10),
            )
        axis.set_yscale("log")
        axis.set_xticks(range(len(shapes)), shapes)
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(ncols=4, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m benchmarks peers`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [peer.name for peer in servers.PEERS]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one measurement, about")
    parser.add_argument("--peers", default=",".join(known), help="of " + ", ".join(known))
    parser.add_argument("--no-mesh", action="store_true", help="leave out the path through two sidecars")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the measurements")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    chosen = parser.parse_args(arguments)
    wanted = [name for name in chosen.peers.split(",") if name]
    if unknown := set(wanted) - set(known):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    console = Console(width=160)
    suite = Suite(console)
    with tempfile.TemporaryDirectory(prefix="mlmesh-peers-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        suite.start(stack, folder, wanted, mesh=not chosen.no_mesh)
        suite.measure(folder, rounds=chosen.rounds, seconds=chosen.seconds, seed=chosen.seed)
        notes = {started.name: started.note for started in suite.started}
    summary = suite.summary()
    show(summary, console)
    for server, reason in suite.absent.items():
        console.print(f"left out: {server}: {reason}")
    rounds = [
        {"server": server, "load": shape, **asdict(measured)}
        for (server, shape), row in suite.rounds.items()
        for measured in row
    ]
    ceilings = {f"batch {batch}": values for batch, values in suite.ceilings.items()}
    document = {"summary": summary, "engine_rows_per_s": ceilings, "servers": notes, "absent": suite.absent}
    write_results(chosen.out, {**document, "rounds": rounds})
    plot(summary, chosen.out.with_suffix(".png"))
    console.print(f"written to {chosen.out} and {chosen.out.with_suffix('.png')}")
