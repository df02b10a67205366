"""Load reports: what they say of engines, queues and the process, and how they are written."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mlmesh_inference.load import LoadMeter, Usage, process_usage
from mlmesh_inference.statistics import Statistics
from mlmesh_runtime import orca


class World:
    """Models and a process, moved by the test."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cpu_s = 0.0
        self.models: list[Any] = []

    def ready_models(self) -> list[Any]:
        return self.models

    def usage(self) -> Usage:
        return Usage(cpu_s=self.cpu_s, cpus=2, memory_bytes=100, memory_most_bytes=400)

    def add(self, name: str, *, concurrency: int = 1, depth: int = 0, capacity: int = 10) -> Statistics:
        statistics = Statistics(name, 1)
        runner = SimpleNamespace(depth=depth, capacity=capacity)
        model = SimpleNamespace(name=name, version=1, runner=runner, statistics=statistics, concurrency=concurrency)
        self.models.append(model)
        return statistics

    def meter(self) -> LoadMeter:
        return LoadMeter(self, usage=self.usage, clock=lambda: self.now)


def test_utilisation_is_that_of_the_most_loaded_version() -> None:
    world = World()
    busy, queued = world.add("busy", concurrency=2), world.add("queued", depth=9)
    meter = world.meter()
    world.now += 2.0
    world.cpu_s += 1.0
    busy.engine_ns += 3_000_000_000  # of the 4 s that two instances have
    busy.success.add(0, 30)
    busy.fail.add(0, 10)
    report = meter.report()
    assert report.utilization == pytest.approx(0.9)
    assert report.utilizations == pytest.approx({"mlmesh.queue_fill": 0.9, "mlmesh.engine_busy": 0.75})
    assert report.metrics["mlmesh.busy/1.engine_busy"] == pytest.approx(0.75)
    assert report.metrics["mlmesh.queued/1.queue_fill"] == pytest.approx(0.9)
    assert (report.cpu, report.memory) == pytest.approx((0.25, 0.25))
    assert (report.rate_per_s, report.errors_per_s) == pytest.approx((20, 5))
    world.now += 2.0
    assert meter.report().rate_per_s == 0, "since the last look"
    busy.close()
    queued.close()


def test_two_looks_in_a_moment_are_one() -> None:
    world = World()
    one = world.add("one")
    meter = world.meter()
    world.now += 1.0
    one.engine_ns += 500_000_000
    assert meter.report().utilization == pytest.approx(0.5)
    world.now += 0.01
    one.engine_ns += 10_000_000
    assert meter.report().utilization == pytest.approx(0.5)
    one.close()


def test_a_report_names_a_bounded_number_of_versions_the_busiest() -> None:
    world = World()
    made = [world.add(f"m{number}", depth=number, capacity=100) for number in range(100)]
    metrics = world.meter().report().metrics
    assert len(metrics) == 64
    assert "mlmesh.m99/1.queue_fill" in metrics
    assert "mlmesh.m0/1.queue_fill" not in metrics
    for one in made:
        one.close()


def test_this_process_uses_something_of_what_there_is() -> None:
    usage = process_usage()
    assert usage.cpu_s > 0
    assert usage.cpus >= 1
    assert 0 < usage.memory_bytes < usage.memory_most_bytes


def test_a_report_is_written_as_the_message_says_and_what_is_no_number_is_left_out() -> None:
    report = orca.LoadReport(
        utilization=1.5, cpu=float("nan"), memory=7.0, rate_per_s=-1.0, utilizations={"a": 2.0}, metrics={"b": 3.5}
    )
    message = orca.OrcaLoadReport.FromString(orca.encode(report))
    assert message.application_utilization == 1.5
    assert (message.cpu_utilization, message.mem_utilization, message.rps_fractional) == (0.0, 1.0, 0.0)
    assert dict(message.utilization) == {"a": 1.0}
    assert dict(message.named_metrics) == {"b": 3.5}


def test_reports_for_calls_are_made_now_and_then_not_for_each() -> None:
    now, made = [0.0], []

    def report() -> orca.LoadReport:
        made.append(now[0])
        return orca.LoadReport(utilization=now[0])

    reporter = orca.LoadReporter(report, age_s=0.5, clock=lambda: now[0])
    first = reporter.trailers()
    assert [key for key, _ in first] == ["endpoint-load-metrics-bin"]
    now[0] = 0.4
    assert reporter.trailers() is first
    now[0] = 0.6
    assert reporter.encoded() == orca.encode(orca.LoadReport(utilization=0.6))
    assert made == [0.0, 0.6]


def test_the_messages_do_not_clash_with_those_of_others_in_the_process() -> None:
    script = (
        "from google.protobuf import descriptor_pb2, descriptor_pool\n"
        "from mlmesh_runtime import orca\n"
        "for file in (orca._data_file(), orca._service_file()):\n"
        "    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())\n"
        "assert descriptor_pool.Default().FindMessageTypeByName('xds.data.orca.v3.OrcaLoadReport') is not "
        "orca.OrcaLoadReport.DESCRIPTOR\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
