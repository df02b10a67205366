"""Metrics as Prometheus scrapes them: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlmesh_local.metrics.names import BUCKETS, OWN, STANDARD
from mlmesh_local.metrics.registry import Distribution, MeshMetrics, Sample, samples

PIECE_LINES = 500
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (*(f"{bound:g}" if bound < 1e6 else str(int(bound)) for bound in BUCKETS), "+Inf")


def exposition(metrics: MeshMetrics) -> Iterator[str]:
    """The text of a scrape, piece by piece: that of many label sets takes a while."""
    piece: list[str] = []
    for line in _lines(metrics):
        piece.append(line)
        if len(piece) >= PIECE_LINES:
            yield "\n".join([*piece, ""])
            piece.clear()
    yield "\n".join([*piece, ""])


def _lines(metrics: MeshMetrics) -> Iterator[str]:
    described = {metric.name: metric for metric in STANDARD}
    last = ""
    for sample in samples(metrics.series):
        if sample.metric != last:
            last = sample.metric
            yield f"# HELP {last} {described[last].help}"
            yield f"# TYPE {last} {described[last].kind}"
        yield from _sample(sample)
    yield from _own("mlmesh_metrics_entries_total", "counter", {"": metrics.entries})
    yield from _own("mlmesh_metrics_dropped_total", "counter", metrics.dropped)
    yield from _own("mlmesh_metrics_series", "gauge", {"": sum(1 for _ in metrics.series)})


def _sample(sample: Sample) -> Iterator[str]:
    labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in sample.labels)
    if not isinstance(sample.value, Distribution):
        yield f"{sample.metric}{{{labels}}} {sample.value}"
        return
    total = 0
    for bound, count in zip(_BOUNDS, sample.value.counts, strict=True):
        total += count
        yield f'{sample.metric}_bucket{{{labels},le="{bound}"}} {total}'
    yield f"{sample.metric}_sum{{{labels}}} {sample.value.total}"
    yield f"{sample.metric}_count{{{labels}}} {total}"


def _own(name: str, kind: str, values: Mapping[str, int]) -> Iterator[str]:
    yield f"# HELP {name} {OWN[name]}"
    yield f"# TYPE {name} {kind}"
    for reason, value in values.items():
        label = f'{{reason="{reason}"}}' if reason else ""
        yield f"{name}{label} {value}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
