"""Resource names: the only way in for text that selects something.

Rules are those of the contract (google.aip.dev/122): `models/{model}`, `models/{model}/versions/{number}`,
`models/{model}/aliases/{alias}`, `blobs/sha256-{hex}`, `uploads/{id}`. Every pattern is matched in full, so nothing
that is not spelled exactly so reaches the database, let alone a path. Errors: InvalidInput naming the field.
"""

import re
from dataclasses import dataclass

from mlmesh_runtime.errors import InvalidInput

MODEL_ID = r"[a-z0-9][a-z0-9-]{0,62}"
ALIAS_ID = r"[a-z][a-z0-9-]{0,62}"
NUMBER = r"[1-9][0-9]{0,17}"
SHA256 = r"[0-9a-f]{64}"
UPLOAD_ID = r"[0-9a-z-]{1,64}"
SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"

ALL_MODELS = "models/-"

_MODEL_ID = re.compile(MODEL_ID)
_MODEL = re.compile(f"models/({MODEL_ID})")
_VERSION = re.compile(f"models/({MODEL_ID})/versions/({NUMBER})")
_ALIAS = re.compile(f"models/({MODEL_ID})/aliases/({ALIAS_ID})")
_BLOB = re.compile(f"blobs/sha256-({SHA256})")
_UPLOAD = re.compile(f"uploads/({UPLOAD_ID})")
_SHA256 = re.compile(SHA256)
_PATH = re.compile(f"{SEGMENT}(/{SEGMENT})*")
_PATH_CHARS_MAX = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionName:
    """A version by number."""

    model: str
    number: int

    def __str__(self) -> str:
        return f"models/{self.model}/versions/{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasName:
    """An alias of a model."""

    model: str
    alias: str

    def __str__(self) -> str:
        return f"models/{self.model}/aliases/{self.alias}"


def model_id(text: str, field: str = "model_id") -> str:
    """Check a bare model id."""
    return _match(_MODEL_ID, text, field, "an id of lower-case letters, digits and dashes, at most 63")[0]


def parse_model(name: str, field: str = "name") -> str:
    """`models/{model}` → model id."""
    return _match(_MODEL, name, field, "models/{model}")[1]


def parse_parent(name: str, field: str = "parent") -> str | None:
    """`models/{model}` → model id; `models/-` → None, which means all models."""
    return None if name == ALL_MODELS else parse_model(name, field)


def parse_version(name: str, field: str = "name") -> VersionName:
    """`models/{model}/versions/{number}`."""
    found = _match(_VERSION, name, field, "models/{model}/versions/{number}")
    return VersionName(model=found[1], number=int(found[2]))


def parse_alias(name: str, field: str = "name") -> AliasName:
    """`models/{model}/aliases/{alias}`."""
    found = _match(_ALIAS, name, field, "models/{model}/aliases/{alias}")
    return AliasName(model=found[1], alias=found[2])


def parse_model_or_alias(name: str, field: str = "parent") -> tuple[str, str | None]:
    """`models/{model}` or an alias of it → model id, and the alias if one is named."""
    if _MODEL.fullmatch(name):
        return parse_model(name, field), None
    found = _match(_ALIAS, name, field, "models/{model} or models/{model}/aliases/{alias}")
    return found[1], found[2]


def parse_version_or_alias(name: str, field: str = "name") -> VersionName | AliasName:
    """Either form; the error names both."""
    if _ALIAS.fullmatch(name):
        return parse_alias(name, field)
    found = _match(_VERSION, name, field, "models/{model}/versions/{number} or models/{model}/aliases/{alias}")
    return VersionName(model=found[1], number=int(found[2]))


def parse_blob(name: str, field: str = "name") -> str:
    """`blobs/sha256-{hex}` → lower-case hex SHA-256."""
    return _match(_BLOB, name, field, "blobs/sha256-{64 lower-case hex digits}")[1]


def parse_upload(name: str, field: str = "name") -> str:
    """`uploads/{id}` → upload id."""
    return _match(_UPLOAD, name, field, "uploads/{id}")[1]


def sha256(text: str, field: str = "sha256") -> str:
    """Check a bare SHA-256."""
    return _match(_SHA256, text, field, "64 lower-case hex digits")[0]


def artifact_path(text: str, field: str) -> str:
    """Check a relative path inside a version: no empty, hidden, upward or absolute parts, at most 255 characters."""
    if len(text) > _PATH_CHARS_MAX:
        raise InvalidInput(f"{field}: {len(text)} characters, at most {_PATH_CHARS_MAX}", field=field)
    return _match(_PATH, text, field, "a relative path such as model.onnx or data/labels.json")[0]


def model_name(model: str) -> str:
    """Model id → `models/{model}`."""
    return f"models/{model}"


def blob_name(hex_digest: str) -> str:
    """Hex SHA-256 → `blobs/sha256-{hex}`."""
    return f"blobs/sha256-{hex_digest}"


def upload_name(upload_id: str) -> str:
    """Upload id → `uploads/{id}`."""
    return f"uploads/{upload_id}"


def _match(pattern: re.Pattern[str], text: str, field: str, form: str) -> re.Match[str]:
    # The text itself is not repeated: it may be megabytes, or an attack on a terminal.
    found = pattern.fullmatch(text)
    if found is None:
        raise InvalidInput(f"{field}: expected {form}, got {len(text)} characters of another form", field=field)
    return found
