"""What this process is to serve: selectors against what the registry says. Pure values and functions.

A selector is one of

- ``NAME@ALIAS``    the version that the alias of this model points to,
- ``*@ALIAS``       the same for every model that has the alias,
- ``NAME/VERSION``  this very version,
- ``NAME``, ``*``   the newest version of this model, of every model.

The first selector in the list that gives a version of a model gives its default version.

A quarantined or deleted version gives nothing, whoever points to it: what must not be served is not served, also when
there is nothing else. Models that hold data sets are passed over. A deprecated version is served as any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec

_NAME: Final = "[a-z0-9][a-z0-9-]{0,62}"
_SELECTOR: Final = re.compile(
    rf"^(?P<model>\*|{_NAME})(@(?P<alias>[a-z][a-z0-9-]{{0,62}})|/(?P<version>[1-9][0-9]{{0,17}}))?$"
)
_PATH: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
_DIGEST: Final = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """One entry of MLMESH_SERVE. `model` is "*" for every model; without alias and version it is the newest."""

    model: str
    alias: str = ""
    version: int = 0


def parse_selectors(text: str) -> tuple[Selector, ...]:
    """Read a comma list of selectors. Raises ValueError that names the wrong one."""
    selectors = []
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            continue
        match = _SELECTOR.match(part)
        if match is None or (match["model"] == "*" and match["version"]):
            raise ValueError(f"{part!r} is none of NAME@ALIAS, *@ALIAS, NAME/VERSION, NAME or *")
        selectors.append(Selector(model=match["model"], alias=match["alias"] or "", version=int(match["version"] or 0)))
    return tuple(selectors)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of a version: relative path, lower-case hex SHA-256, bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        """Refuse a path that leaves its folder and a digest that is none: both name files here."""
        if not _PATH.fullmatch(self.path) or not _DIGEST.fullmatch(self.sha256) or self.size < 0:
            raise ValueError(f"not a file of a model: {self.path!r} ({self.size} bytes)")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """A version as the registry has it. `signature` is None when the publisher gave none.

    A quarantined one must not be served.
    """

    model: str
    version: int
    files: tuple[ModelFile, ...]
    signature: Signature | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    quarantined: bool = False

    @property
    def model_file(self) -> ModelFile | None:
        """The file to build: model.onnx, else the only .onnx file."""
        onnx = [file for file in self.files if file.path.endswith(".onnx")]
        candidates = [file for file in onnx if file.path == "model.onnx"] or onnx
        return candidates[0] if len(candidates) == 1 else None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryView:
    """What the registry said last: versions by (model, number), aliases by (model, alias), up to `revision`.

    `datasets` are the models whose versions are data, not models.
    """

    revision: int = 0
    versions: Mapping[tuple[str, int], VersionRecord] = field(default_factory=dict)
    aliases: Mapping[tuple[str, str], int] = field(default_factory=dict)
    datasets: frozenset[str] = frozenset()

    def with_version(self, record: VersionRecord, revision: int) -> RegistryView:
        """The view after a version was published, or its stage changed."""
        return replace(self, revision=revision, versions={**self.versions, (record.model, record.version): record})

    def without_version(self, model: str, version: int, revision: int) -> RegistryView:
        """The view after a version was deleted."""
        versions = {key: record for key, record in self.versions.items() if key != (model, version)}
        return replace(self, revision=revision, versions=versions)

    def with_model(self, model: str, revision: int, *, servable: bool) -> RegistryView:
        """The view after a model was registered or changed."""
        datasets = self.datasets - {model} if servable else self.datasets | {model}
        return replace(self, revision=revision, datasets=datasets)

    def with_alias(self, model: str, alias: str, version: int, revision: int) -> RegistryView:
        """The view after an alias was created or moved."""
        return replace(self, revision=revision, aliases={**self.aliases, (model, alias): version})

    def without_alias(self, model: str, alias: str, revision: int) -> RegistryView:
        """The view after an alias was deleted."""
        aliases = {key: value for key, value in self.aliases.items() if key != (model, alias)}
        return replace(self, revision=revision, aliases=aliases)

    def at(self, revision: int) -> RegistryView:
        """The same view, known to hold at a later revision."""
        return replace(self, revision=max(self.revision, revision))

    def numbers(self, model: str) -> list[int]:
        """Versions of a model that may be served, newest first."""
        numbers = (number for name, number in self.versions if name == model and self.servable(name, number))
        return sorted(numbers, reverse=True)

    def models(self) -> list[str]:
        """Models that have versions."""
        return sorted({name for name, _ in self.versions})

    def servable(self, model: str, version: int) -> bool:
        """Whether there is such a version, and it may be served."""
        record = self.versions.get((model, version))
        return record is not None and not record.quarantined and model not in self.datasets

    def aliases_of(self, model: str) -> dict[str, int]:
        """Versions by alias of a model."""
        return {alias: version for (name, alias), version in self.aliases.items() if name == model}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Versions of one model to serve, in the order of the selectors, and the one for requests that name none."""

    versions: tuple[int, ...]
    default: int


def wanted(selectors: Sequence[Selector], view: RegistryView) -> dict[str, Wanted]:
    """Versions to serve by model. An alias or number that the registry does not have gives nothing."""
    found: dict[str, list[int]] = {}
    for selector in selectors:
        for model in view.models() if selector.model == "*" else [selector.model]:
            version = _selected(selector, model, view)
            if version and view.servable(model, version) and version not in found.setdefault(model, []):
                found[model].append(version)
    return {model: Wanted(versions=tuple(numbers), default=numbers[0]) for model, numbers in found.items() if numbers}


def _selected(selector: Selector, model: str, view: RegistryView) -> int:
    if selector.alias:
        return view.aliases.get((model, selector.alias), 0)
    if selector.version:
        return selector.version
    return next(iter(view.numbers(model)), 0)


def to_json(view: RegistryView) -> dict[str, Any]:
    """A view as plain values, for the disk."""
    return {
        "format": 1,
        "revision": view.revision,
        "aliases": [[model, alias, version] for (model, alias), version in sorted(view.aliases.items())],
        "datasets": sorted(view.datasets),
        "versions": [
            {
                "model": record.model,
                "version": record.version,
                "files": [asdict(file) for file in record.files],
                "labels": dict(record.labels),
                "quarantined": record.quarantined,
                "signature": None
                if record.signature is None
                else {
                    "inputs": [_tensor_to_json(spec) for spec in record.signature.inputs],
                    "outputs": [_tensor_to_json(spec) for spec in record.signature.outputs],
                },
            }
            for record in view.versions.values()
        ],
    }


def from_json(data: Mapping[str, Any]) -> RegistryView:
    """Read `to_json`. Raises ValueError, KeyError or TypeError on anything else."""
    if data["format"] != 1:
        raise ValueError(f"format {data['format']!r} is not known")
    versions = {}
    for item in data["versions"]:
        signature = item["signature"]
        record = VersionRecord(
            model=item["model"],
            version=item["version"],
            files=tuple(ModelFile(**file) for file in item["files"]),
            labels=item["labels"],
            # Views that were kept before there were stages and data sets know of none.
            quarantined=item.get("quarantined", False),
            signature=None
            if signature is None
            else Signature(
                inputs=tuple(map(_tensor_from_json, signature["inputs"])),
                outputs=tuple(map(_tensor_from_json, signature["outputs"])),
            ),
        )
        versions[record.model, record.version] = record
    aliases = {(model, alias): version for model, alias, version in data["aliases"]}
    datasets = frozenset(data.get("datasets", ()))
    return RegistryView(revision=data["revision"], versions=versions, aliases=aliases, datasets=datasets)


def _tensor_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype.name, "shape": list(spec.shape)}


def _tensor_from_json(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=data["name"], datatype=DATATYPES[data["datatype"]], shape=tuple(data["shape"]))


def signature_mismatch(said: Signature, found: Signature) -> str:
    """How the registry's signature differs from the model file's, "" when it does not. -1 goes with any dimension."""
    for side in ("inputs", "outputs"):
        expected: dict[str, TensorSpec] = {spec.name: spec for spec in getattr(said, side)}
        actual: dict[str, TensorSpec] = {spec.name: spec for spec in getattr(found, side)}
        if expected and expected.keys() != actual.keys():
            return f"the registry says {side} {sorted(expected)}, the model file has {sorted(actual)}"
        for name, spec in expected.items():
            other = actual[name]
            fits = len(spec.shape) == len(other.shape) and all(
                one == two or -1 in (one, two) for one, two in zip(spec.shape, other.shape, strict=True)
            )
            if spec.datatype is not other.datatype or not fits:
                return (
                    f"the registry says '{name}' is {spec.datatype.name}{list(spec.shape)}, "
                    f"the model file says {other.datatype.name}{list(other.shape)}"
                )
    return ""
