"""Telemetry: https://istio.io/latest/docs/reference/config/telemetry/."""

from __future__ import annotations

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import Meta, Telemetry, Tracing
from mlmesh_local.resources.security import selector


def parse_telemetry(meta: Meta, spec: Fields) -> Telemetry:
    """Read a Telemetry's spec."""
    spec.unsupported("metrics", why="the laptop mesh counts calls by gRPC status itself")
    tracing: Tracing | None = None
    for item in spec.messages("tracing"):
        with item:
            found = _tracing(item)
        tracing = found if tracing is None else tracing
    access_logs: bool | None = None
    for item in spec.messages("accessLogging"):
        with item:
            item.unsupported("filter", "match")
            _providers(item, only="envoy")
            disabled = item.boolean("disabled")
        access_logs = not disabled
    return Telemetry(meta=meta, selector=selector(spec), tracing=tracing, access_logs=access_logs)


def _tracing(fields: Fields) -> Tracing:
    fields.unsupported("match", "useRequestIdForTraceSampling", "enableIstioTags")
    # Whatever provider is named, the laptop mesh exports to its own collector.
    _providers(fields, only="")
    tags: list[tuple[str, str]] = []
    for key, node, at in fields.entries("customTags"):
        with Fields(node, at, fields.problems) as tag:
            tag.unsupported("environment", "header", "formatter")
            with tag.message("literal") as literal:
                tags.append((key, literal.text("value", required=True)))
    return Tracing(
        sampling_percent=fields.number("randomSamplingPercentage", low=0.0, high=100.0),
        disabled=fields.boolean_or_none("disableSpanReporting"),
        tags=tuple(sorted(tags)),
    )


def _providers(fields: Fields, *, only: str) -> None:
    count = 0
    for item in fields.messages("providers"):
        with item:
            name = item.text("name", required=True)
            count += 1
            if only and name and name != only:
                item.refuse("name", f'not supported: the laptop mesh has the provider "{only}" only')
            if count > 1:
                item.refuse("name", "not supported: more than one provider")
