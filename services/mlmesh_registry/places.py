"""Where blobs are kept, by a URL."""

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlmesh_registry.blobs import Blobs
from mlmesh_registry.folder import FolderBlobs
from mlmesh_registry.objects import SCHEMES, ObjectBlobs, open_store
from mlmesh_runtime.config import ConfigError

VARIABLE = "MLMESH_REGISTRY_BLOBS_URL"


def open_blobs(url: str, default: Path) -> Blobs:
    """Open the store of a URL; empty: a folder. Blocking. Errors: ConfigError naming the variable."""
    scheme = urlsplit(url).scheme
    if scheme in SCHEMES:
        return ObjectBlobs(open_store(url, VARIABLE))
    if url and (scheme != "file" or urlsplit(url).netloc or not urlsplit(url).path.startswith("/")):
        expected = ", ".join(f"{each}://bucket/prefix" for each in SCHEMES)
        raise ConfigError(f"{VARIABLE}: expected {expected} or file:///path, got {scheme or 'no'} scheme")
    folder = Path(url2pathname(urlsplit(url).path)) if url else default
    try:
        return FolderBlobs(folder)
    except OSError as error:
        name = VARIABLE if url else "MLMESH_DATA_DIR"
        raise ConfigError(f"{name}: cannot use {folder}: {error.strerror}") from error
