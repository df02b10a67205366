"""The client for asyncio."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import grpc

from mlmesh_client import rows as packing
from mlmesh_client.aio_stream import AioStream, ended
from mlmesh_client.calling import (
    FOREVER_S,
    IN_FLIGHT,
    MODEL_FRESH_S,
    Clocked,
    Metadata,
    Models,
    Options,
    Reconnecting,
    chance_of,
    described,
    merged,
    stream_options,
)
from mlmesh_client.connecting import TIMEOUT_S, Tls, channel_options
from mlmesh_client.errors import InvalidInput, NotFound, Unavailable, Unsupported, from_call
from mlmesh_client.messages import Inputs, Model, Parameter, Result, SequencePlace, Server, request_of, result_of
from mlmesh_client.retry import Retries, RetryPolicy
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from open_inference import model_config_pb2


class AioClient:
    """A client of an Open Inference Protocol server, for one event loop.

    >>> async with AioClient("localhost:9000") as client:                     # doctest: +SKIP
    ...     result = await client.infer("mnist", {"image": images})
    ...     result["probabilities"]

    Args:
        target: "host:port", "unix:path" or any other of gRPC's, such as "xds:///service".
        tls: None is plaintext, as towards a sidecar. credentials: instead of it, any of gRPC's (xDS, ALTS, ...).
        authority: the :authority to send, where it is not the target: behind a sidecar the service's own name.
        metadata: sent with every call.
        timeout: deadline of calls that name none, seconds.
        retry: bounds of retries. chance: spreads them.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        authority: str = "",
        metadata: Metadata = (),
        timeout: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._options = Options(target=target, metadata=merged((), metadata), timeout_s=timeout)
        self._retries = Retries(retry or RetryPolicy(), chance_of(chance))
        self._models = Models()
        options = channel_options(authority, tls)
        if credentials is None and tls is not None:
            credentials = tls.credentials()
        self._channel = (
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
        )
        self._stub: Any = stubs.GRPCInferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls in flight fail."""
        await self._channel.close(None)

    def __repr__(self) -> str:
        return f"<AioClient {self._options.target}>"

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout: float | None = None,
        id: str = "",  # noqa: A002  the protocol's word
        priority: int = 0,
        parameters: Mapping[str, Parameter] | None = None,
        sequence: SequencePlace | None = None,
        metadata: Metadata | None = None,
    ) -> Result:
        """Ask a model.

        Args:
            inputs: tensors by name, as arrays or nested lists; for a model of one input also the tensor alone.
            outputs: names wanted; None for all. version: "" lets the server choose.
            timeout: seconds for everything, retries included; None: the client's.
            priority: 1 is the most urgent, 0 the model's default. parameters: the model's own.
            sequence: place in a sequence of a stateful model.

        Raises InferenceError: see `errors`.
        """
        clock = self._clock(timeout)
        sent = merged(self._options.metadata, metadata)

        def make(described_model: Model) -> pb.ModelInferRequest:
            return request_of(
                described_model,
                inputs,
                version=version,
                request_id=id,
                wanted=outputs,
                parameters=parameters,
                priority=priority,
                sequence=sequence,
            )

        request = await self._made(make, model, version, sent, clock)
        try:
            reply = await self._call(
                self._stub.ModelInfer, request, metadata=sent, clock=clock, repeatable=sequence is None
            )
        except (InvalidInput, NotFound):
            self._models.drop(model, version, sent)
            raise
        return result_of(reply)

    async def infer_many(
        self,
        model: str,
        rows: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        rows_per_message: int = 0,
        in_flight: int = 8,
        outputs: Sequence[str] | None = None,
        version: str = "",
        parameters: Mapping[str, Parameter] | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncIterator[Result]:
        """Ask a model about many rows: a result a row, in their order, while rows are still taken.

        The cost of a request is per message, not per row; so rows are packed into messages.

        Args:
            rows: tensors of one row each, without the batch dimension.
            rows_per_message: 0: as many as the model takes, at most 64. in_flight: messages on their way.
        """
        stream = self.stream(model, version=version, in_flight=in_flight, metadata=metadata)
        messages: deque[packing.Message] = deque()
        async with stream:
            packer = packing.Packer(stream.model, rows_per_message=rows_per_message)

            async def send(packed: Sequence[packing.Message]) -> None:
                for message in packed:
                    request = stream.make(message.inputs, wanted=outputs, parameters=parameters)
                    messages.append(message)
                    await stream.send_message(request, timeout=FOREVER_S)

            async def feed() -> None:
                try:
                    async for row in packing.each(rows):
                        await send(packer.add(row))
                    await send(packer.rest())
                finally:
                    stream.done_sending()

            feeding = asyncio.ensure_future(feed())
            try:
                async for result in stream:
                    for row in packing.split(result, messages.popleft()):
                        yield row
                await feeding
            finally:
                await ended(feeding)

    def stream(
        self,
        model: str,
        *,
        version: str = "",
        in_flight: int = IN_FLIGHT,
        metadata: Metadata | None = None,
        connection_s: float | None = None,
        stalled_s: float | None = None,
        give_up_s: float | None = None,
    ) -> AioStream:
        """A stream to a model; see AioStream.

        Args:
            in_flight: requests without a result that was taken.
            connection_s: deadline of one connection; the stream then opens another.
            stalled_s: how long to wait for an answer before looking for another server.
            give_up_s: how long to go on without any answer, before the stream fails.
        """
        bounds = {"connection_s": connection_s, "stalled_s": stalled_s, "give_up_s": give_up_s}
        options = stream_options(self._options, in_flight, metadata, **bounds)
        return AioStream(
            connect=self._stub.ModelStreamInfer,
            describe=functools.partial(self.model, model, version=version, metadata=metadata),
            version=version,
            options=options,
            reconnecting=Reconnecting(options, self._retries),
            name=model,
        )

    async def model(
        self, name: str, *, version: str = "", timeout: float | None = None, metadata: Metadata | None = None
    ) -> Model:
        """What the server says of a model; kept for a while. Raises NotFound."""
        sent = merged(self._options.metadata, metadata)
        if (found := self._models.get(name, version, (sent, "config"))) is not None:
            return found
        clock = self._clock(timeout)
        reply = await self._metadata(name, version, sent, clock)
        try:
            request = pb.ModelConfigRequest(name=name, version=version)
            config = await self._call(self._stub.ModelConfig, request, metadata=sent, clock=clock)
        except Unsupported:
            config = None
        return self._models.put(name, version, (sent, "config"), described(reply, config))

    async def config(
        self, name: str, *, version: str = "", timeout: float | None = None
    ) -> model_config_pb2.ModelConfig:
        """How a model is served: the protocol's message. Raises NotFound; Unsupported by servers that do not tell."""
        request = pb.ModelConfigRequest(name=name, version=version)
        reply = await self._call(self._stub.ModelConfig, request, clock=self._clock(timeout))
        return cast("model_config_pb2.ModelConfig", reply.config)

    async def statistics(
        self, name: str = "", *, version: str = "", timeout: float | None = None
    ) -> list[pb.ModelStatistics]:
        """What models have done: the protocol's messages, of one version, all of a model, or all models."""
        request = pb.ModelStatisticsRequest(name=name, version=version)
        reply = await self._call(self._stub.ModelStatistics, request, clock=self._clock(timeout))
        return list(reply.model_stats)

    async def live(self, *, timeout: float | None = None) -> bool:
        """Whether the server runs. False when none answers."""
        return await self._whether(self._stub.ServerLive, pb.ServerLiveRequest(), "live", timeout)

    async def ready(self, model: str = "", *, version: str = "", timeout: float | None = None) -> bool:
        """Whether the server, or a model on it, answers requests. False when no server answers."""
        if model:
            return await self._whether(
                self._stub.ModelReady, pb.ModelReadyRequest(name=model, version=version), "ready", timeout
            )
        return await self._whether(self._stub.ServerReady, pb.ServerReadyRequest(), "ready", timeout)

    async def server(self, *, timeout: float | None = None) -> Server:
        """Name, version and extensions of the server."""
        reply = await self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest(), clock=self._clock(timeout))
        return Server(name=reply.name, version=reply.version, extensions=tuple(reply.extensions))

    def _clock(self, timeout: float | None) -> Clocked:
        return Clocked(self._options.timeout_s if timeout is None else timeout)

    async def _whether(self, method: Any, request: Any, field: str, timeout: float | None) -> bool:
        try:
            reply = await self._call(method, request, clock=self._clock(timeout), tries=False)
        except (NotFound, Unavailable):
            return False
        return bool(getattr(reply, field))

    async def _metadata(self, name: str, version: str, sent: Metadata, clock: Clocked) -> pb.ModelMetadataResponse:
        request = pb.ModelMetadataRequest(name=name, version=version)
        reply = await self._call(self._stub.ModelMetadata, request, metadata=sent, clock=clock)
        return cast("pb.ModelMetadataResponse", reply)

    async def _made(
        self, make: Callable[[Model], pb.ModelInferRequest], model: str, version: str, sent: Metadata, clock: Clocked
    ) -> pb.ModelInferRequest:
        """The request, by what is known of the model; asked again before anything is refused by old knowledge."""
        found = self._models.get(model, version, sent)
        if found is not None:
            try:
                return make(found)
            except InvalidInput:
                if self._models.get(model, version, sent, younger_s=MODEL_FRESH_S) is not None:
                    raise
        reply = await self._metadata(model, version, sent, clock)
        return make(self._models.put(model, version, sent, described(reply, None)))

    async def _call(
        self,
        method: Any,
        request: Any,
        *,
        clock: Clocked,
        metadata: Metadata | None = None,
        repeatable: bool = True,
        tries: bool = True,
    ) -> Any:
        """One call, tried again as `retry` says. Raises InferenceError."""
        sent = self._options.metadata if metadata is None else metadata
        for attempt in itertools.count(1):
            try:
                reply = await method(request, timeout=clock.left_s(), metadata=sent)
            except grpc.aio.AioRpcError as error:
                failed = from_call(error)
            else:
                self._retries.succeeded()
                return reply
            wait_s = self._retries.wait_s(failed, attempt, left_s=clock.left_s(), repeatable=repeatable)
            if wait_s is None or not tries:
                raise failed
            await asyncio.sleep(wait_s)
        raise AssertionError
