"""A client of Open Inference Protocol servers, sync and asyncio: numpy in and out, deadlines, retry hints, streams that
outlive connections and move where the mesh wants them."""

from mlmesh_client.aio import AioClient
from mlmesh_client.aio_stream import AioStream
from mlmesh_client.client import Client
from mlmesh_client.connecting import Tls
from mlmesh_client.errors import (
    Denied,
    InferenceError,
    InvalidInput,
    NotFound,
    Overloaded,
    SequenceLost,
    ServerError,
    TimedOut,
    Unavailable,
    Unsupported,
)
from mlmesh_client.messages import EndOfStream, Model, Result, SequencePlace, Server
from mlmesh_client.retry import RetryPolicy
from mlmesh_client.stream import Stream
from mlmesh_client.tensors import TensorSpec

__all__ = [
    "AioClient",
    "AioStream",
    "Client",
    "Denied",
    "EndOfStream",
    "InferenceError",
    "InvalidInput",
    "Model",
    "NotFound",
    "Overloaded",
    "Result",
    "RetryPolicy",
    "SequenceLost",
    "SequencePlace",
    "Server",
    "ServerError",
    "Stream",
    "TensorSpec",
    "TimedOut",
    "Tls",
    "Unavailable",
    "Unsupported",
]
