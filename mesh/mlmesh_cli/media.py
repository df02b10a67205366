"""Images, texts and sounds sent to models that take them whole, and what comes back made readable.

Everything goes over one stream, because a model may answer several times (boxes first, then the text in them) and
because sound is a sequence: 32 ms a request, the server keeps the state.
"""

from __future__ import annotations

import asyncio
import time
import wave
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlmesh_cli import tensors
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.inferring import Metadata
from mlmesh_cli.names import ModelReference
from mlmesh_cli.tensors import Array
from open_inference import grpc_service_pb2 as oip

if TYPE_CHECKING:
    from open_inference.grpc_service_pb2_grpc import GRPCInferenceServiceAsyncStub

_BYTES_MAX = 64 << 20
_IN_FLIGHT = 32
_FINAL = "triton_final_response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """What a person gave: a file, or a text."""

    name: str
    image: bytes = b""
    text: str = ""
    audio: Path | None = None


@dataclass(slots=True, kw_only=True)
class Heard:
    """Everything that came back to one of them.

    Attributes:
        parts: outputs of each answer, in their order; of a sound one a request. seconds: when each came, after sending.
    """

    name: str
    version: str = ""
    error: str = ""
    parts: list[dict[str, Array]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    frame_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON output."""
        parts = [{name: _plain(array) for name, array in part.items()} for part in self.parts]
        latencies = [round(second, 6) for second in self.seconds]
        return {"name": self.name, "version": self.version, "error": self.error, "answers": parts, "seconds": latencies}


def _plain(array: Array) -> Any:
    if array.dtype == object:
        return [each.decode(errors="replace") for each in array.ravel()]
    return array.tolist()


def given(images: Sequence[Path], texts: Sequence[str], sounds: Sequence[Path]) -> list[Media]:
    """What the options say. Raises CliError for a file that is too large."""
    found = []
    for path in images:
        if path.stat().st_size > _BYTES_MAX:
            raise usage_error(f"{path} has more than {_BYTES_MAX} bytes", "send a smaller image")
        found.append(Media(name=path.name, image=path.read_bytes()))
    found += [Media(name=text if len(text) <= 40 else f"{text[:39]}…", text=text) for text in texts]
    return [*found, *(Media(name=path.name, audio=path) for path in sounds)]


async def ask(
    stub: GRPCInferenceServiceAsyncStub,
    reference: ModelReference,
    media: Sequence[Media],
    *,
    metadata: Metadata = (),
    timeout_s: float = 60.0,
) -> list[Heard]:
    """Send them over one stream and wait for everything. Raises CliError when the model does not take such a thing."""
    if reference.alias:
        raise usage_error("an alias is not part of a request", "the mesh routes by subset: name the model alone")
    request = oip.ModelMetadataRequest(name=reference.model, version=reference.version)
    described = await stub.ModelMetadata(request, metadata=metadata)
    made = [await asyncio.to_thread(_requests, described, reference, each, place) for place, each in enumerate(media)]
    heard = [Heard(name=each.name, frame_s=requests.frame_s) for each, requests in zip(media, made, strict=True)]
    left = {message.id: place for place, requests in enumerate(made) for message in requests.messages}
    sent: dict[str, float] = {}
    room = asyncio.Semaphore(_IN_FLIGHT)

    async def messages() -> AsyncIterator[oip.ModelInferRequest]:
        for requests in made:
            for message in requests.messages:
                await room.acquire()
                sent[message.id] = time.perf_counter()
                yield message

    async for answer in stub.ModelStreamInfer(messages(), metadata=metadata, timeout=timeout_s):
        response = answer.infer_response
        if response.id not in left:
            continue
        one = heard[left[response.id]]
        one.version = response.model_version or one.version
        one.error = one.error or answer.error_message
        if response.outputs:
            one.parts.append(tensors.outputs(response))
            one.seconds.append(time.perf_counter() - sent[response.id])
        if answer.error_message or response.parameters[_FINAL].bool_param:
            del left[response.id]
            room.release()
    if left:
        raise CliError(
            f"the stream ended with {len(left)} requests unanswered",
            "try again; `mlmesh status` shows what restarted",
            reason="STREAM_CUT",
        )
    return heard


@dataclass(frozen=True, slots=True, kw_only=True)
class _Requests:
    messages: Sequence[oip.ModelInferRequest]
    frame_s: float = 0.0


def _requests(described: oip.ModelMetadataResponse, reference: ModelReference, media: Media, place: int) -> _Requests:
    wanted = "FP32" if media.audio is not None else "BYTES"
    tensor = next((each for each in described.inputs if each.datatype == wanted), None)
    if tensor is None or len(described.inputs) != 1:
        raise CliError(
            f"{reference.model} does not take {'sound' if media.audio else 'an image or a text as it is'}",
            "`mlmesh models sample` publishes models that do",
            reason="WRONG_INPUT",
        )
    if media.audio is None:
        data = media.image or media.text.encode()
        array = np.array([data], object).reshape([1] * len(tensor.shape))
        return _Requests(messages=[_message(described, reference, (tensor.name, "BYTES", array), tag=f"{place}")])
    frame = int(tensor.shape[-1])
    if len(tensor.shape) != 2 or frame < 1:
        raise CliError(f"{reference.model} takes {list(tensor.shape)}, not frames of sound", reason="WRONG_INPUT")
    samples = read_sound(media.audio, 16_000)
    count = max(-(-len(samples) // frame), 1)
    padded = np.zeros(count * frame, np.float32)
    padded[: len(samples)] = samples
    messages = []
    for index, row in enumerate(padded.reshape(count, 1, frame)):
        message = _message(described, reference, (tensor.name, "FP32", row), tag=f"{place}.{index}")
        message.parameters["sequence_id"].int64_param = place + 1
        message.parameters["sequence_start"].bool_param = index == 0
        message.parameters["sequence_end"].bool_param = index == count - 1
        messages.append(message)
    return _Requests(messages=messages, frame_s=frame / 16_000)


def _message(
    described: oip.ModelMetadataResponse, reference: ModelReference, tensor: tuple[str, str, Array], *, tag: str
) -> oip.ModelInferRequest:
    message = tensors.infer_request(described.name, [tensor], version=reference.version, request_id=tag)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def read_sound(path: Path, rate: int) -> Array:
    """Samples of a WAV file of 16 bit PCM at a rate or a multiple of it, mixed, FP32 -1 to 1. Raises CliError."""
    try:
        with wave.open(str(path)) as file:
            channels, width, own, count = file.getparams()[:4]
            data = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise CliError(f"{path} is no WAV file of PCM: {error}", "`ffmpeg -i FILE -ar 16000 -ac 1 out.wav`") from None
    if width != 2 or own % rate:
        problem = f"{path} has {8 * width} bits at {own} Hz; expected 16 bits at {rate} Hz or a multiple"
        raise CliError(problem, "`ffmpeg -i FILE -ar 16000 -ac 1 out.wav`")
    mixed = np.frombuffer(data, "<i2").astype(np.float32).reshape(-1, channels).mean(axis=1) / 32768
    every = own // rate
    samples: Array = mixed[: len(mixed) // every * every].reshape(-1, every).mean(axis=1)
    return samples


def stretches(chances: Sequence[float], frame_s: float, *, threshold: float = 0.5) -> list[tuple[float, float]]:
    """Begin and end, in seconds, of what is speech; gaps of a tenth of a second are part of it."""
    found: list[tuple[float, float]] = []
    for place, chance in enumerate(chances):
        if chance < threshold:
            continue
        begin, end = place * frame_s, (place + 1) * frame_s
        if found and begin - found[-1][1] <= 0.1:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def readable(heard: Heard) -> list[str]:
    """Lines for a person."""
    if heard.error:
        return [f"failed: {heard.error}"]
    if heard.frame_s:
        chances = [float(next(iter(part.values())).ravel()[0]) for part in heard.parts]
        spoken = stretches(chances, heard.frame_s)
        lines = [f"speech from {begin:.2f} to {end:.2f} s" for begin, end in spoken] or ["no speech"]
        return [*lines, f"{len(chances) * heard.frame_s:.2f} s of sound in {len(chances)} requests"]
    lines = []
    for part, second in zip(heard.parts, heard.seconds, strict=True):
        lines += [f"after {second * 1000:.0f} ms: {line}" for line in _lines(part)]
    return lines


def _lines(part: Mapping[str, Array]) -> list[str]:
    words = next((name for name in ("text", "label") if name in part), "")
    if words:
        sure = part.get("confidence")
        shares = [""] * part[words].size if sure is None else [f" ({share:.1%})" for share in sure.ravel()]
        return [
            f"{word.decode(errors='replace')}{share}" for word, share in zip(part[words].ravel(), shares, strict=True)
        ]
    if "boxes" in part:
        count = len(part["boxes"])
        return [f"{count} line{'' if count == 1 else 's'} of text found"]
    return [f"{name} {list(array.shape)} {_preview(array)}" for name, array in part.items()]


def _preview(array: Array) -> str:
    values = array.ravel()
    shown = ", ".join(f"{each:.4g}" if array.dtype.kind == "f" else str(each) for each in values[:6])
    return f"[{shown}{', …' if values.size > 6 else ''}]"
