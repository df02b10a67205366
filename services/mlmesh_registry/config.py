"""The registry's own environment variables, beside those of mlmesh_runtime.config."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_runtime.config import ConfigError, Variable

VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="MLMESH_REGISTRY_CHANGES_KEPT",
        default="100000",
        meaning="Changes that a watch can be resumed over; older ones are dropped.",
    ),
    Variable(
        name="MLMESH_REGISTRY_WATCH_QUEUE_ITEMS_MAX",
        default="4096",
        meaning="A watcher further behind than this many changes is ended (WATCHER_TOO_SLOW).",
    ),
    Variable(
        name="MLMESH_REGISTRY_WATCH_STALL_S",
        default="30",
        meaning="A watcher that takes no event for this many seconds is ended (WATCHER_TOO_SLOW).",
    ),
    Variable(
        name="MLMESH_REGISTRY_BOOKMARK_S",
        default="5",
        meaning="An idle watch gets a bookmark this often, in seconds; a client that misses three reconnects.",
    ),
    Variable(
        name="MLMESH_REGISTRY_UPLOAD_TTL_S",
        default="86400",
        meaning="An upload that got no bytes for this many seconds is discarded.",
    ),
    Variable(name="MLMESH_REGISTRY_BLOB_BYTES_MAX", default="68719476736", meaning="Largest blob, in bytes."),
    Variable(
        name="MLMESH_REGISTRY_COMMIT_BYTES",
        default="16777216",
        meaning="An upload is synced to disk at least once per this many bytes, and when its stream ends or is cut.",
    ),
    Variable(
        name="MLMESH_REGISTRY_REQUEST_TTL_S",
        default="604800",
        meaning="How long the first answer to a request_id is repeated, in seconds.",
    ),
    Variable(
        name="MLMESH_REGISTRY_DELETED_KEPT_S",
        default="2592000",
        meaning="How long deleted models and versions can be brought back, in seconds; after that they are purged.",
    ),
    Variable(
        name="MLMESH_REGISTRY_GARBAGE_GRACE_S",
        default="604800",
        meaning="Bytes that no version uses stay this long after they came or were last used, in seconds.",
    ),
    Variable(
        name="MLMESH_REGISTRY_BLOBS_URL",
        default="",
        meaning=(
            "Where bytes are kept: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///path. "
            "Endpoint and credentials are those of the environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY or a web identity; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME, "
            "AZURE_STORAGE_ACCOUNT_KEY. Empty: a folder in the data folder."
        ),
    ),
    Variable(
        name="MLMESH_REGISTRY_DATABASE_URL",
        default="",
        meaning=(
            "postgresql://user:password@host:port/database, for registries that share it. "
            "Empty: SQLite in the data folder, for one process."
        ),
    ),
    Variable(
        name="MLMESH_REGISTRY_POLL_S",
        default="2",
        meaning="How long, in seconds, a change of another registry may go unnoticed when a NOTIFY is lost.",
    ),
    Variable(
        name="MLMESH_REGISTRY_TRUSTED_KEYS",
        default="",
        meaning=(
            "Folder of public keys (PEM; P-256, P-384 or P-521) that versions may be signed with; "
            "read again when it changes. Empty: signatures are refused."
        ),
    ),
)


# Fields whose variables are text; all others are numbers.
_TEXTS = frozenset({"blobs_url", "database_url", "trusted_keys"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    """What bounds a registry. Times are seconds, sizes bytes; the table above says what each means."""

    changes_kept: int = 100_000
    watch_queue_items_max: int = 4096
    watch_stall_s: float = 30.0
    bookmark_s: float = 5.0
    upload_ttl_s: float = 86_400.0
    blob_bytes_max: int = 1 << 36
    commit_bytes: int = 1 << 24
    request_ttl_s: float = 604_800.0
    deleted_kept_s: float = 2_592_000.0
    garbage_grace_s: float = 604_800.0
    blobs_url: str = ""
    database_url: str = field(default="", repr=False)  # It may hold a password.
    poll_s: float = 2.0
    trusted_keys: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "RegistrySettings":
        """Read and check. Raises ConfigError that names the first wrong variable."""
        values: dict[str, int | float | str] = {}
        for variable in VARIABLES:
            name = variable.name.removeprefix("MLMESH_REGISTRY_").lower()
            kind = float if name.endswith("_s") else int
            text = environ.get(variable.name, "").strip() or variable.default
            if name in _TEXTS:
                values[name] = text
                continue
            try:
                value = kind(text)
            except ValueError:
                raise ConfigError(f"{variable.name}: expected a number, got {text!r}") from None
            if not 0 < value < 2**53:
                raise ConfigError(f"{variable.name}: expected a number above 0, got {text!r}")
            values[name] = value
        return cls(**values)  # type: ignore[arg-type]  # each field got the kind that its name asks for
