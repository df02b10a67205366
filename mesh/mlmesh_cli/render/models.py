"""`mlmesh models`: models, versions, aliases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.stages import stage
from mlmesh_cli.render.status import table


def models_table(models: Iterable[pb.Model], aliases: Iterable[pb.ModelAlias], now: datetime) -> RenderableType:
    """One row a model, with where its aliases point."""
    by_model: dict[str, list[str]] = defaultdict(list)
    for alias in aliases:
        by_model[alias.name.split("/aliases/")[0]].append(f"{t.last(alias.name)} → {t.last(alias.version)}")
    result = table("model", ">latest", "aliases", "labels", "created", "description")
    for model in models:
        result.add_row(
            t.last(model.name),
            str(model.latest_version) if model.latest_version else "-",
            ", ".join(by_model[model.name]) or "-",
            labels_text(model.labels),
            t.ago(model.create_time, now),
            model.description.split("\n")[0][:60],
        )
    return result if result.row_count else Text("no models yet: `mlmesh train` makes one", style="dim")


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels as k=v, sorted."""
    return ", ".join(f"{k}={v}" for k, v in sorted(labels.items())) or "-"


def versions_table(versions: Iterable[pb.ModelVersion], now: datetime) -> RenderableType:
    """One row a version, newest first."""
    result = table("version", "aliases", ">accuracy", ">F1", ">size", "job", "published", "by")
    for version in versions:
        metrics = dict(version.metrics)
        result.add_row(
            t.model_version(version.name) if version.stage <= pb.VERSION_STAGE_ACTIVE else _with_stage(version),
            Text(", ".join(t.last(alias) for alias in version.aliases) or "-", style="cyan"),
            t.percent(metrics.get("accuracy", -1)),
            t.percent(next((metrics[name] for name in ("f1", "f1_macro") if name in metrics), -1)),
            t.size(sum(artifact.size_bytes for artifact in version.artifacts)),
            version.lineage.job or "-",
            t.ago(version.create_time, now),
            t.last(version.creator) or "-",
        )
    return result if result.row_count else Text("no versions yet", style="dim")


def _with_stage(version: pb.ModelVersion) -> Text:
    return Text(f"{t.model_version(version.name)} ").append_text(stage(version.stage))


def _signature_table(signature: pb.ModelSignature) -> RenderableType:
    result = table("", "tensor", "type", "shape")
    for label, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            shape = "[" + ", ".join("?" if d < 0 else str(d) for d in spec.shape) + "]"
            result.add_row(label, spec.name, spec.datatype, Text(shape))
    return result


def version_view(version: pb.ModelVersion, now: datetime) -> RenderableType:
    """All that is known of one version."""
    head = Text(t.model_version(version.name), style="bold")
    if version.aliases:
        head.append("  " + ", ".join(t.last(alias) for alias in version.aliases), style="cyan not bold")
    head.append(f"  {version.digest}", style="dim not bold")
    files = table("file", ">size", "type", "blob")
    for artifact in version.artifacts:
        files.add_row(artifact.path, t.size(artifact.size_bytes), artifact.media_type or "-", artifact.blob)
    metrics = table("metric", ">value")
    for name, value in sorted(version.metrics.items()):
        metrics.add_row(name, f"{value:.6g}")
    lineage = version.lineage
    facts = {
        "stage": f"{stage(version.stage)}  {version.stage_reason}".strip() if version.stage else "",
        "deleted": f"{t.ago(version.delete_time, now)}, for good {t.until(version.purge_time, now)}"
        if version.HasField("delete_time")
        else "",
        "verified": t.ago(version.verify_time, now) if version.HasField("verify_time") else "",
        "published": f"{t.ago(version.create_time, now)} by {version.creator or 'unknown'}",
        "job": lineage.job,
        "data": f"{lineage.dataset} {lineage.dataset_fingerprint[:16]}".strip(),
        "code": lineage.code_digest[:16],
        "environment": lineage.environment_digest[:16],
        "parents": ", ".join(lineage.parents),
        "study": lineage.study,
        "source": lineage.source_uri,
        "labels": labels_text(version.labels),
        "description": version.description,
    }
    lines = [Text(f"{name}: ", style="bold") + Text(value, style="default") for name, value in facts.items() if value]
    return Group(head, *lines, _signature_table(version.signature), files, metrics)


def model_view(
    model: pb.Model, aliases: Sequence[pb.ModelAlias], versions: Sequence[pb.ModelVersion], now: datetime
) -> RenderableType:
    """A model with its aliases and newest versions."""
    head = Text(t.last(model.name), style="bold")
    head.append(f"  {model.description}" if model.description else "", style="default not bold")
    moved = table("alias", "version", "moved", "by", "etag")
    for alias in aliases:
        mover = t.last(alias.updater) or "-"
        moved.add_row(t.last(alias.name), t.last(alias.version), t.ago(alias.update_time, now), mover, alias.etag)
    return Group(head, moved, versions_table(versions, now))


def aliases_table(aliases: Iterable[pb.ModelAlias], now: datetime) -> RenderableType:
    """One row an alias, with the etag that moves it."""
    result = table("model", "alias", "version", "moved", "by", "etag")
    for alias in aliases:
        model, name = alias.name.removeprefix("models/").split("/aliases/")
        mover = t.last(alias.updater) or "-"
        result.add_row(model, name, t.last(alias.version), t.ago(alias.update_time, now), mover, alias.etag)
    return result if result.row_count else Text("no aliases", style="dim")
