"""Publishing to a registry in this process, in as few words as a test wants."""

import hashlib
import json

from mlmesh_registry.ledger import Upload
from mlmesh_registry.names import AliasName, VersionName
from mlmesh_registry.registry import Registry
from mlmesh_registry.versions import Artifact, Content, Model, Version
from mlmesh_runtime.chunks import Chunk, crc32c


def chunk(data: bytes, offset: int = 0) -> Chunk:
    """A chunk with its right checksum."""
    return Chunk(offset, data, crc32c(data))


def some_bytes(seed: object, size: int) -> bytes:
    """A file of a format that may be stored, of exactly this size: what is in it does not compress.

    The same for the same seed. Below 128 bytes it is text, else safetensors with one tensor.
    """
    noise = hashlib.shake_256(repr(seed).encode())
    if size < 128:
        return noise.hexdigest(size).encode()[:size]
    # The header's length is fixed, so that the size comes out right.
    count = size - 8 - 96
    entry = json.dumps({"noise": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}})
    return (96).to_bytes(8, "little") + entry.ljust(96).encode() + noise.digest(count)


def sha256(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


async def start(registry: Registry, data: bytes, request_id: str = "") -> Upload:
    """Open an upload for bytes that are not here yet."""
    upload = await registry.artifacts.start(sha256(data), len(data), request_id=request_id, actor="")
    assert isinstance(upload, Upload)
    return upload


async def append(registry: Registry, upload: Upload, *chunks: Chunk) -> None:
    """One stream of chunks."""
    async with registry.artifacts.appending(upload.id) as live:
        for each in chunks:
            await live.append(each)


async def put(registry: Registry, data: bytes) -> str:
    """Upload bytes; their digest."""
    upload = await start(registry, data)
    await append(registry, upload, chunk(data))
    return (await registry.artifacts.finish(upload.id)).sha256


async def read(registry: Registry, digest: str, offset: int = 0, limit_bytes: int = 0) -> bytes:
    """Download bytes."""
    parts = [part async for part, _ in registry.artifacts.read(digest, offset=offset, limit_bytes=limit_bytes)]
    return b"".join(part.data for part in parts)


async def create_model(registry: Registry, model_id: str = "m", request_id: str = "") -> Model:
    """Register a name."""
    return await registry.store.create_model(model_id, description="", labels={}, request_id=request_id, actor="")


async def publish(
    registry: Registry, digest: str, model_id: str = "m", *, description: str = "", request_id: str = ""
) -> Version:
    """Publish one file as the next version."""
    content = Content(artifacts=(Artifact(path="model.onnx", sha256=digest),), description=description)
    return await registry.store.create_version(model_id, content, request_id=request_id, actor="")


def alias(name: str, model_id: str = "m") -> AliasName:
    """The name of an alias."""
    return AliasName(model=model_id, alias=name)


def number(value: int, model_id: str = "m") -> VersionName:
    """The name of a version."""
    return VersionName(model=model_id, number=value)
