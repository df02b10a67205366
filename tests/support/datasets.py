"""Small data sets for tests, as files and as registered versions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mlmesh.registry.v1 import registry_pb2 as pb
from tests.support.registry_process import Client


def houses(rows: int = 120) -> bytes:
    """A table with all that tables have: categories, missing values, a repeated row, a constant column, names."""
    random = np.random.default_rng(4)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["rooms", "area", "district", "country", "owner", "price"])
    for index in range(rows):
        rooms, area = int(random.integers(1, 7)), float(random.normal(90, 25))
        district = ("north", "south", "west")[index % 3]
        price = 20 * rooms + 2 * area + {"north": 50, "south": 0, "west": -30}[district] + random.normal(0, 5)
        shown = "" if index % 17 == 0 else "inf" if index == 5 else f"{area:.1f}"
        writer.writerow([rooms, shown, "?" if index == 8 else district, "here", f"person {index}", f"{price:.2f}"])
    lines = file.getvalue().splitlines()
    return "\n".join([*lines, lines[3], "1,50,north,here,nobody,"]).encode() + b"\n"


def fetched(folder: Path, files: Mapping[str, bytes], labels: Mapping[str, str]) -> Path:
    """Files in a job's folder, as the service leaves them there."""
    place = folder / "dataset"
    place.mkdir(parents=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    described = {"version": "models/x/versions/1", "digest": "", "labels": dict(labels), "files": list(files)}
    (place / "_version.json").write_text(json.dumps(described))
    return folder


async def registered(
    client: Client,
    name: str,
    files: Mapping[str, bytes],
    labels: Mapping[str, str],
    *,
    kind: pb.ModelKind.ValueType = pb.MODEL_KIND_DATASET,
    aliases: Iterable[str] = (),
) -> str:
    """A version of a data set in a real registry; its name."""
    await client.stub.CreateModel(pb.CreateModelRequest(model_id=name, kind=kind, request_id=f"model-{name}"))
    artifacts = [pb.Artifact(path=path, blob=(await client.put(data)).name) for path, data in files.items()]
    version = pb.ModelVersion(artifacts=artifacts, labels=dict(labels))
    request = pb.CreateModelVersionRequest(parent=f"models/{name}", model_version=version)
    made = (await client.stub.CreateModelVersion(request)).model_version
    for alias in aliases:
        await client.stub.SetModelAlias(
            pb.SetModelAliasRequest(name=f"models/{name}/aliases/{alias}", version=made.name)
        )
    return str(made.name)
