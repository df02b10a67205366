"""Models, versions and aliases as values: what they are, what is legal, how they are digested. Pure.

Times are timezone-aware UTC datetimes. Sizes are bytes. Mappings are never changed after construction.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

from mlmesh_registry import names
from mlmesh_registry.conditions import Gate
from mlmesh_runtime.errors import InvalidInput

_UNSIGNED = {"UINT8", "UINT16", "UINT32", "UINT64"}
_SIGNED = {"INT8", "INT16", "INT32", "INT64"}
DATATYPES = frozenset({"BOOL", "BYTES", "FP16", "BF16", "FP32", "FP64"} | _UNSIGNED | _SIGNED)
"""Datatypes of the Open Inference Protocol, with Triton's BF16."""

LABELS_MAX = 64
LABEL_KEY_CHARS_MAX = 128
LABEL_VALUE_CHARS_MAX = 4096
DESCRIPTION_CHARS_MAX = 65536
ARTIFACTS_MAX = 256
METRICS_MAX = 256
TENSORS_MAX = 256
RANK_MAX = 16
PARENTS_MAX = 64
SOURCE_URI_CHARS_MAX = 2048
REASON_CHARS_MAX = 4096

ModelKind = Literal["MODEL", "DATASET"]
Stage = Literal["ACTIVE", "DEPRECATED", "QUARANTINED"]

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A name under which versions are published; `revision` is that of its last change."""

    id: str
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    create_time: datetime
    update_time: datetime
    revision: int
    latest_version: int = 0
    kind: ModelKind = "MODEL"
    gates: tuple[Gate, ...] = ()
    delete_time: datetime | None = None
    purge_time: datetime | None = None

    @property
    def name(self) -> str:
        """Resource name."""
        return names.model_name(self.id)

    @property
    def etag(self) -> str:
        """Changes with every update, deletion and return, not with new versions."""
        return etag(self.revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output; dimensions include the batch dimension, -1 is dynamic."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model takes and gives, in the model's order."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One file of a version: relative path, hex SHA-256 of its bytes, size (0 until the blob is looked up)."""

    path: str
    sha256: str
    size_bytes: int = 0
    media_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a version came from."""

    job: str = ""
    dataset: str = ""
    dataset_fingerprint: str = ""
    code_digest: str = ""
    environment_digest: str = ""
    parents: tuple[str, ...] = ()
    study: str = ""
    source_uri: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a publisher says of a version: everything that its digest covers."""

    artifacts: tuple[Artifact, ...]
    signature: Signature = field(default_factory=Signature)
    metrics: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    labels: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    lineage: Lineage = field(default_factory=Lineage)
    description: str = ""
    model_card: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A published version: the content and what the registry added. `aliases` are those that point here now.

    `revision` is that of its publication, `meta_revision` that of the last change of its stage or deletion.
    `corrupt_time` is since when its bytes are known to be others than those published.
    """

    model: str
    number: int
    content: Content
    digest: str
    create_time: datetime
    creator: str
    revision: int
    aliases: tuple[str, ...] = ()
    stage: Stage = "ACTIVE"
    stage_reason: str = ""
    meta_revision: int
    verify_time: datetime | None = None
    corrupt_time: datetime | None = None
    delete_time: datetime | None = None
    purge_time: datetime | None = None

    @property
    def name(self) -> str:
        """Resource name."""
        return f"models/{self.model}/versions/{self.number}"

    @property
    def etag(self) -> str:
        """Changes with every change of stage and with deletion."""
        return etag(self.meta_revision)

    @property
    def size_bytes(self) -> int:
        """Size of its files together."""
        return sum(artifact.size_bytes for artifact in self.content.artifacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A movable name for a version; `revision` is that of its last move."""

    model: str
    alias: str
    version: int
    update_time: datetime
    updater: str
    revision: int

    @property
    def name(self) -> str:
        """Resource name."""
        return f"models/{self.model}/aliases/{self.alias}"

    @property
    def version_name(self) -> str:
        """Resource name of the version pointed at."""
        return f"models/{self.model}/versions/{self.version}"

    @property
    def etag(self) -> str:
        """Changes with every move, also when the alias is deleted and made again; "" before the first."""
        return etag(self.revision) if self.revision else ""


def etag(revision: int) -> str:
    """Etag of something last changed at a revision; short, because people type it."""
    return f"r{revision}"


def canonical(value: object) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, UTF-8, shortest floats; NaN and infinities do not exist."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def manifest(content: Content) -> dict[str, Any]:
    """Content as plain JSON values; `content_from` is the inverse. Artifacts are sorted by path.

    Keys that came later are there only when they say something: the digest of what was published before them stays.
    """
    later = {key: value for key in ("study", "source_uri") if (value := getattr(content.lineage, key))}
    card = {"model_card": content.model_card} if content.model_card else {}
    return {
        "artifacts": [
            {"path": a.path, "sha256": a.sha256, "size_bytes": a.size_bytes, "media_type": a.media_type}
            for a in sorted(content.artifacts, key=lambda a: a.path)
        ],
        "signature": {
            side: [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]
            for side, tensors in (("inputs", content.signature.inputs), ("outputs", content.signature.outputs))
        },
        "metrics": {key: float(value) for key, value in content.metrics.items()},
        "labels": dict(content.labels),
        "lineage": {
            "job": content.lineage.job,
            "dataset": content.lineage.dataset,
            "dataset_fingerprint": content.lineage.dataset_fingerprint,
            "code_digest": content.lineage.code_digest,
            "environment_digest": content.lineage.environment_digest,
            "parents": list(content.lineage.parents),
            **later,
        },
        "description": content.description,
        **card,
    }


def content_from(data: Mapping[str, Any]) -> Content:
    """Content of a manifest."""

    def tensors(side: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=t["name"], datatype=t["datatype"], shape=tuple(t["shape"])) for t in data["signature"][side]
        )

    lineage = dict(data["lineage"])
    return Content(
        artifacts=tuple(Artifact(**a) for a in data["artifacts"]),
        signature=Signature(inputs=tensors("inputs"), outputs=tensors("outputs")),
        metrics=data["metrics"],
        labels=data["labels"],
        lineage=Lineage(**{**lineage, "parents": tuple(lineage["parents"])}),
        description=data["description"],
        model_card=data.get("model_card", ""),
    )


def digest(content: Content) -> str:
    """`sha256-{hex}` over the canonical manifest: the same content has the same digest under any name and number."""
    return "sha256-" + hashlib.sha256(canonical(manifest(content))).hexdigest()


def fingerprint(*parts: object) -> str:
    """Hex SHA-256 over plain JSON values: whether a repeated request_id came with the same content."""
    return hashlib.sha256(canonical(list(parts))).hexdigest()


def check_text(text: str, where: str, chars_max: int = DESCRIPTION_CHARS_MAX) -> str:
    """Refuse text that is too long, or holds NUL, which not every database stores."""
    if len(text) > chars_max:
        raise InvalidInput(f"{where}: {len(text)} characters, at most {chars_max}", field=where)
    if "\0" in text:
        raise InvalidInput(f"{where}: holds a NUL character", field=where)
    return text


def check_labels(labels: Mapping[str, str], where: str = "labels") -> Mapping[str, str]:
    """At most 64 labels; keys of 1 to 128 characters, values of at most 4096."""
    _at_most(len(labels), LABELS_MAX, where)
    for key, value in labels.items():
        if not key:
            raise InvalidInput(f"{where}: empty key", field=where)
        check_text(key, where, LABEL_KEY_CHARS_MAX)
        check_text(value, where, LABEL_VALUE_CHARS_MAX)
    return labels


def check_content(content: Content, where: str = "model_version") -> Content:
    """Everything that must hold of a version whatever the transport checked. Errors: InvalidInput naming the field."""
    _check_artifacts(content.artifacts, f"{where}.artifacts")
    for side, tensors in (("inputs", content.signature.inputs), ("outputs", content.signature.outputs)):
        _check_tensors(tensors, f"{where}.signature.{side}")
    _at_most(len(content.metrics), METRICS_MAX, f"{where}.metrics")
    for key, value in content.metrics.items():
        check_text(key, f"{where}.metrics", LABEL_KEY_CHARS_MAX)
        if not math.isfinite(value):
            raise InvalidInput(f"{where}.metrics: a value is {value}; figures are finite", field=f"{where}.metrics")
    check_labels(content.labels, f"{where}.labels")
    check_text(content.description, f"{where}.description")
    check_text(content.model_card, f"{where}.model_card")
    _check_lineage(content.lineage, f"{where}.lineage")
    return content


def _check_artifacts(artifacts: Sequence[Artifact], where: str) -> None:
    if not artifacts:
        raise InvalidInput(f"{where}: a version has at least one file", field=where)
    _at_most(len(artifacts), ARTIFACTS_MAX, where)
    seen: set[str] = set()
    for position, artifact in enumerate(artifacts):
        path = names.artifact_path(artifact.path, f"{where}[{position}].path").lower()
        names.sha256(artifact.sha256, f"{where}[{position}].blob")
        check_text(artifact.media_type, f"{where}[{position}].media_type", 127)
        # Compared without case: two names must not become one file on a disk that ignores case.
        if path in seen:
            raise InvalidInput(f"{where}[{position}].path: the same path twice", field=f"{where}[{position}].path")
        seen.add(path)
    for path in seen:
        parts = path.split("/")
        if any("/".join(parts[:depth]) in seen for depth in range(1, len(parts))):
            raise InvalidInput(f"{where}: a path is both a file and a folder", field=where)


def _check_tensors(tensors: Sequence[TensorSpec], where: str) -> None:
    _at_most(len(tensors), TENSORS_MAX, where)
    seen: set[str] = set()
    for position, tensor in enumerate(tensors):
        at = f"{where}[{position}]"
        check_text(tensor.name, f"{at}.name", 256)
        if not tensor.name or tensor.name in seen:
            raise InvalidInput(f"{at}.name: empty, or the same name twice", field=f"{at}.name")
        if tensor.datatype not in DATATYPES:
            raise InvalidInput(f"{at}.datatype: not one of {', '.join(sorted(DATATYPES))}", field=f"{at}.datatype")
        _at_most(len(tensor.shape), RANK_MAX, f"{at}.shape")
        if any(size < -1 for size in tensor.shape):
            raise InvalidInput(f"{at}.shape: a dimension is below -1", field=f"{at}.shape")
        seen.add(tensor.name)


def _check_lineage(lineage: Lineage, where: str) -> None:
    for name in ("job", "dataset", "dataset_fingerprint", "code_digest", "environment_digest", "study"):
        check_text(getattr(lineage, name), f"{where}.{name}", 256)
    check_text(lineage.source_uri, f"{where}.source_uri", SOURCE_URI_CHARS_MAX)
    _at_most(len(lineage.parents), PARENTS_MAX, f"{where}.parents")
    for position, parent in enumerate(lineage.parents):
        names.parse_version(parent, f"{where}.parents[{position}]")


def _at_most(count: int, most: int, where: str) -> None:
    if count > most:
        raise InvalidInput(f"{where}: {count} items, at most {most}", field=where)
