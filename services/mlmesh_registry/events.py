"""Changes: the entries of the totally ordered log, and their stored form. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from mlmesh_registry import conditions
from mlmesh_registry.versions import Alias, Model, Version, content_from, manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedAlias:
    """An alias that is gone, and the version that it pointed at."""

    model: str
    alias: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedVersion:
    """A version that is hidden until it is brought back or goes for good. Without its content: a model may take
    100,000 of them along."""

    model: str
    number: int
    digest: str
    revision: int
    meta_revision: int
    delete_time: datetime
    purge_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedModel:
    """A model that is hidden, as it is now; its versions were announced before it."""

    model: Model


Subject = Model | Version | Alias | DeletedAlias | DeletedVersion | DeletedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change: what it made of its subject, when, and who made it."""

    revision: int
    time: datetime
    actor: str
    subject: Subject

    @property
    def model(self) -> str:
        """Id of the model that the change belongs to."""
        match self.subject:
            case Model():
                return self.subject.id
            case DeletedModel():
                return self.subject.model.id
            case _:
                return self.subject.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookmark:
    """Everything up to `revision` has been sent."""

    revision: int
    time: datetime


def to_micros(time: datetime) -> int:
    """Microseconds since the epoch, the stored form of a time."""
    delta = time - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_micros(micros: int) -> datetime:
    """Inverse of to_micros, exact."""
    seconds, rest = divmod(micros, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def encode(subject: Subject) -> tuple[str, dict[str, Any]]:
    """Kind and plain JSON values of a subject."""
    match subject:
        case Version():
            plain = {
                "model": subject.model,
                "number": subject.number,
                "content": manifest(subject.content),
                "digest": subject.digest,
                "create_time": to_micros(subject.create_time),
                "creator": subject.creator,
                "revision": subject.revision,
                **{name: _plain(getattr(subject, name)) for name in _STANDING},
            }
            return "version", plain
        case Model():
            # asdict cannot copy a mapping proxy.
            plain = {name: _plain(getattr(subject, name)) for name in Model.__dataclass_fields__}
            return "model", {**plain, "gates": [conditions.plain(gate) for gate in subject.gates]}
        case DeletedModel():
            return "deleted_model", encode(subject.model)[1]
        case DeletedVersion():
            return "deleted_version", {key: _plain(value) for key, value in asdict(subject).items()}
        case Alias():
            return "alias", {key: _plain(value) for key, value in asdict(subject).items()}
        case DeletedAlias():
            return "deleted_alias", asdict(subject)


def decode(kind: str, plain: Mapping[str, Any]) -> Subject:
    """Inverse of encode; a version comes back without its aliases."""
    data = dict(plain)
    for key in _TIMES:
        if data.get(key) is not None:
            data[key] = from_micros(data[key])
    match kind:
        case "model" | "deleted_model":
            # Entries written before there were gates have none.
            model = Model(**{**data, "gates": tuple(map(conditions.gate_from, data.get("gates", ())))})
            return model if kind == "model" else DeletedModel(model=model)
        case "version":
            return Version(**{"meta_revision": data["revision"], **data, "content": content_from(data["content"])})
        case "deleted_version":
            return DeletedVersion(**data)
        case "alias":
            return Alias(**data)
        case "deleted_alias":
            return DeletedAlias(**data)
        case _:
            raise ValueError(f"unknown kind of change: {kind}")


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return to_micros(value)
    return dict(value) if isinstance(value, Mapping) else value


_TIMES = ("create_time", "update_time", "verify_time", "corrupt_time", "delete_time", "purge_time")
# What is known of a version beside its content; entries written before it was known lack it.
_STANDING = ("stage", "stage_reason", "meta_revision", "verify_time", "corrupt_time", "delete_time", "purge_time")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
