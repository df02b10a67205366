"""`mlmesh datasets`: what can be trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as registry
from mlmesh.training.v1 import training_pb2 as training
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table

_CLASSES_SHOWN = 6


def datasets_view(
    named: Iterable[training.Dataset],
    models: Iterable[registry.Model],
    aliases: Iterable[registry.ModelAlias],
    now: datetime,
) -> RenderableType:
    """Data sets that packages ship, then registered ones."""
    shipped = table("data set", "kind", "example", "classes", "from", "what it is")
    for dataset in named:
        shipped.add_row(
            dataset.name,
            kind_name(dataset.kind),
            "x".join(map(str, dataset.example_shape)) or "-",
            _classes(list(dataset.classes)),
            dataset.distribution,
            dataset.description,
        )
    by_model: dict[str, list[str]] = defaultdict(list)
    for alias in aliases:
        by_model[alias.name.split("/aliases/")[0]].append(f"{t.last(alias.name)} → {t.last(alias.version)}")
    registered = table("registered", ">latest", "aliases", "registered on", "description")
    for model in models:
        registered.add_row(
            t.last(model.name),
            str(model.latest_version) if model.latest_version else "-",
            ", ".join(by_model[model.name]) or "-",
            t.ago(model.create_time, now),
            model.description.split("\n")[0][:60],
        )
    none = Text("none is registered: `mlmesh datasets register` does that", style="dim")
    return Group(shipped, registered if registered.row_count else none)


def kind_name(kind: training.DatasetKind.ValueType) -> str:
    """What the examples are, in a word."""
    return t.enum_name("DATASET_KIND_", training.DatasetKind.Name(kind))


def _classes(names: list[str]) -> str:
    if len(names) <= _CLASSES_SHOWN:
        return ", ".join(names) or "-"
    return f"{len(names)}: {names[0]} … {names[-1]}"
