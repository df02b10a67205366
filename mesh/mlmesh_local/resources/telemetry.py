"""Telemetry: https://istio.io/latest/docs/reference/config/telemetry/.

Rules of validity are those of Istio's pkg/config/validation/validation.go and of its CustomResourceDefinition.
"""

from __future__ import annotations

from typing import cast

from mlmesh_local.metrics.expressions import ExpressionError, compile_expression
from mlmesh_local.metrics.names import BY_SELECTOR
from mlmesh_local.resources.cel import cel_problem
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_telemetry import (
    LogRule,
    MetricOverride,
    MetricsRule,
    Mode,
    TagOverride,
    Telemetry,
    TracingRule,
)
from mlmesh_local.resources.security import selector, targets
from mlmesh_local.resources.span_tags import custom_tags

_MODES = ("CLIENT_AND_SERVER", "CLIENT", "SERVER")
_ALL = "ALL_METRICS"


def parse_telemetry(meta: Meta, spec: Fields) -> Telemetry:
    """Read a Telemetry's spec."""
    targeted = targets(spec)
    tracing: list[TracingRule] = []
    for item in spec.messages("tracing"):
        with item:
            tracing.append(_tracing(item))
    logs: list[LogRule] = []
    for item in spec.messages("accessLogging"):
        with item:
            logs.append(_logging(item))
    metrics: list[MetricsRule] = []
    for item in spec.messages("metrics"):
        with item:
            metrics.append(_metrics(item))
    return Telemetry(
        meta=meta,
        selector=selector(spec),
        targets=targeted,
        tracing=tuple(tracing),
        logs=tuple(logs),
        metrics=tuple(metrics),
    )


def _tracing(fields: Fields) -> TracingRule:
    fields.unsupported("disableContextPropagation", why="the Envoy of the laptop does not have it")
    tags = custom_tags(fields) if fields.has("customTags") else None
    fields.ignored("customTags")
    return TracingRule(
        mode=_match(fields),
        providers=_providers(fields),
        sampling_percent=fields.number("randomSamplingPercentage", low=0.0, high=100.0),
        disabled=fields.boolean_or_none("disableSpanReporting"),
        tags=tags,
        use_request_id=fields.boolean_or_none("useRequestIdForTraceSampling"),
        istio_tags=fields.boolean_or_none("enableIstioTags"),
    )


def _logging(fields: Fields) -> LogRule:
    expression: str | None = None
    if fields.has("filter"):
        with fields.message("filter") as inner:
            expression = inner.text("expression")
            problem = cel_problem(expression)
            if problem:
                inner.refuse("expression", problem)
    fields.ignored("filter")
    return LogRule(
        mode=_match(fields),
        providers=_providers(fields),
        disabled=fields.boolean("disabled"),
        expression=expression,
    )


def _metrics(fields: Fields) -> MetricsRule:
    overrides: list[MetricOverride] = []
    for item in fields.messages("overrides"):
        with item:
            overrides.append(_override(item))
    return MetricsRule(
        providers=_providers(fields),
        overrides=tuple(overrides),
        interval_s=fields.duration_s("reportingInterval"),
    )


def _override(fields: Fields) -> MetricOverride:
    metric = ""
    with fields.message("match") as match:
        mode = cast("Mode", match.choice("mode", _MODES, "CLIENT_AND_SERVER"))
        match.one_of("metric", "customMetric")
        selected = match.choice("metric", (_ALL, *BY_SELECTOR), _ALL)
        custom = match.text("customMetric", required=match.has("customMetric"))
        if custom:
            match.refuse("customMetric", "not supported: the laptop mesh has Istio's standard metrics only")
        metric = "" if selected == _ALL else selected
    tags: list[TagOverride] = []
    for name, node, at in fields.entries("tagOverrides"):
        with Fields(node, at, fields.problems) as tag:
            tags.append(_tag_override(name, tag))
    return MetricOverride(
        metric=metric, mode=mode, disabled=fields.boolean_or_none("disabled"), tags=tuple(sorted(tags, key=_name))
    )


def _name(tag: TagOverride) -> str:
    return tag.name


def _tag_override(name: str, fields: Fields) -> TagOverride:
    if not (name.isascii() and name.replace("_", "a").isalnum() and not name[:1].isdigit()):
        fields.problems.add(fields.at, f'"{name}" is not the name of a label that the laptop mesh can tell')
    operation = fields.choice("operation", ("UPSERT", "REMOVE"), "UPSERT")
    value = fields.text("value")
    if operation == "REMOVE":
        if value:
            fields.refuse("value", "must not be set when the operation is REMOVE")
        return TagOverride(name=name, expression=None)
    if not value:
        fields.problems.add(fields.at, '"value" is required when the operation is UPSERT')
        return TagOverride(name=name, expression="''")
    try:
        compile_expression(value)
    except ExpressionError as error:
        fields.refuse("value", f"is not an expression that the laptop mesh understands: {error}")
    return TagOverride(name=name, expression=value)


def _match(fields: Fields) -> Mode:
    with fields.message("match") as match:
        return cast("Mode", match.choice("mode", _MODES, "CLIENT_AND_SERVER"))


def _providers(fields: Fields) -> tuple[str, ...]:
    found: list[str] = []
    for item in fields.messages("providers"):
        with item:
            found.append(item.text("name", required=True))
    return tuple(name for name in found if name)
