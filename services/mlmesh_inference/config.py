"""What an inference process was told beside the runtime's settings; read once from the environment mapping."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mlmesh_inference import config_engines
from mlmesh_inference.desired import Selector, parse_selectors
from mlmesh_runtime.config import ConfigError, Settings, Variable

_KEY_BYTES_MIN: Final = 16

VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="MLMESH_BATCH_ROWS_MAX",
        default="64",
        meaning="Most rows of one request, and of one batch.",
    ),
    Variable(
        name="MLMESH_BATCH_ROWS_PREFERRED",
        default="8",
        meaning=(
            "A batch takes no further request once it has this many rows. Where it is not set, what is measured "
            "decides (MLMESH_ENGINE_TUNING)."
        ),
    ),
    Variable(
        name="MLMESH_QUEUE_ITEMS_MAX",
        default="256",
        meaning="Requests of one model version that may wait; one more is RESOURCE_EXHAUSTED (QUEUE_FULL).",
    ),
    Variable(
        name="MLMESH_ENGINE_CONCURRENCY",
        default="",
        meaning="Batches of one model version that run at once on the CPU. Default: one a CPU, at most 4.",
    ),
    Variable(
        name="MLMESH_ENGINE_THREADS",
        default="1",
        meaning="CPU threads of one batch.",
    ),
    Variable(
        name="MLMESH_MODEL_MIB_MAX",
        default="8192",
        meaning="Largest weights of one model, in MiB; a larger one is refused before it is read.",
    ),
    Variable(
        name="MLMESH_MODEL_TRIAL",
        default="1",
        meaning=(
            "1: a model file that was never seen is first loaded and run once in a process of its own, within limits. "
            "0: not, which saves a second a new version where everybody who publishes is trusted."
        ),
    ),
    Variable(
        name="MLMESH_MEMORY_MIB",
        default="",
        meaning=(
            "Memory that models may take together, in MiB. What would go beyond puts the longest unused versions to "
            "sleep; a request for one loads it again. Default: no bound."
        ),
    ),
    Variable(
        name="MLMESH_CONCURRENCY_LIMIT",
        default="gradient",
        meaning=(
            "How the number of requests inside of a model version is limited by their latency: gradient, or off. One "
            "more is RESOURCE_EXHAUSTED (CONCURRENCY_LIMIT)."
        ),
    ),
    Variable(
        name="MLMESH_LOAD_TRAILERS",
        default="0",
        meaning=(
            "1: every answer of the inference protocol carries an ORCA load report (endpoint-load-metrics-bin), for "
            "balancers that weigh by load. Out of band (OpenRcaService) there are reports for whoever asks."
        ),
    ),
    Variable(
        name="MLMESH_OIP_DIALECT",
        default="triton",
        meaning=(
            "What ModelStreamInfer answers callers that do not say (x-oip-dialect): triton (ModelStreamInferResponse) "
            "or mlserver (ModelInferResponse)."
        ),
    ),
    Variable(
        name="MLMESH_OIP_COMPAT",
        default="",
        meaning=(
            "triton: do as Triton does where the protocol leaves a choice: outputs always raw, and the server is not "
            "ready while any version loads or has failed."
        ),
    ),
    Variable(
        name="MLMESH_LOAD_FILES",
        default="0",
        meaning=(
            "1: RepositoryModelLoad may bring a model's files along. Whoever may call it then decides what runs here."
        ),
    ),
    Variable(
        name="MLMESH_SHARED_MEMORY",
        default="0",
        meaning="1: callers on this machine may use POSIX shared memory for inputs and outputs.",
    ),
    Variable(
        name="MLMESH_STREAM_AGE_S",
        default="0",
        meaning="Inference streams that can move are asked to open again when they are about this old. 0: never.",
    ),
    Variable(
        name="MLMESH_STREAM_KEY",
        default="",
        meaning=(
            "File whose bytes (16 or more) seal the state of sequences that move from a draining server to another; "
            "all servers have the same. Without one such a stream stays until its sequences end."
        ),
    ),
    Variable(
        name="MLMESH_ENGINE",
        default="auto",
        meaning=(
            "Engine of models that do not declare one (mlmesh.engine): auto, onnxruntime, openvino, torch, "
            "torch-compiled, tensorrt."
        ),
    ),
    Variable(
        name="MLMESH_PRECISION",
        default="",
        meaning=(
            "Precision of models that do not declare one (mlmesh.precision): fp32, bf16 or fp16. Empty: as the model "
            "says. A lower one is used where it is faster and answers within the tolerance."
        ),
    ),
    Variable(
        name="MLMESH_ENGINE_TUNING",
        default="background",
        meaning=(
            "When engines are tried and measured: background, while ONNX Runtime serves; load, before a version is "
            "ready; off, only where a model declares another engine than ONNX Runtime."
        ),
    ),
    *config_engines.VARIABLES,
)


ENGINES: Final = ("auto", "onnxruntime", "openvino", "torch", "torch-compiled", "tensorrt")
"""What MLMESH_ENGINE may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolSettings:
    """Choices that the Open Inference Protocol leaves to a server.

    Attributes:
        dialect: of streams whose caller does not say. compat: "triton" to do as Triton does, "" for our own way.
        load_files: whether loads may bring files along. shared_memory: whether local callers may share memory.
        load_trailers: whether answers carry load reports.
    """

    dialect: str = "triton"
    compat: str = ""
    load_files: bool = False
    shared_memory: bool = False
    load_trailers: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> ProtocolSettings:
        """Read and check. Raises ConfigError that names the variable."""
        return cls(
            dialect=_choice(environ, "MLMESH_OIP_DIALECT", ("triton", "mlserver")),
            compat=_choice(environ, "MLMESH_OIP_COMPAT", ("", "triton")),
            load_files=_choice(environ, "MLMESH_LOAD_FILES", ("0", "1")) == "1",
            shared_memory=_choice(environ, "MLMESH_SHARED_MEMORY", ("0", "1")) == "1",
            load_trailers=_choice(environ, "MLMESH_LOAD_TRAILERS", ("0", "1")) == "1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSettings:
    """Bounds and selectors of an inference process, and what its engines are to be where a model does not say.

    `memory_bytes` 0 is no bound of what models take together. `rows_said`, `concurrency_said`: somebody set the
    variable, so that what is measured does not change it.
    """

    selectors: tuple[Selector, ...] = ()
    engine: str = "auto"
    precision: str = ""
    tuning: str = "background"
    rows_max: int = 64
    rows_preferred: int = 8
    rows_said: bool = False
    queue_items_max: int = 256
    limiter: bool = True
    concurrency: int = 1
    concurrency_said: bool = False
    threads: int = 1
    model_bytes_max: int = 8 << 30
    model_trial: bool = True
    memory_bytes: int = 0
    stream_age_s: float = 0.0
    stream_key: bytes = field(default=b"", repr=False)
    protocol: ProtocolSettings = field(default_factory=ProtocolSettings)

    @classmethod
    def from_settings(cls, settings: Settings, *, cpus: int | None = None) -> InferenceSettings:
        """Read and check. Raises ConfigError that names the variable."""
        try:
            selectors = parse_selectors(settings.serve)
        except ValueError as error:
            raise ConfigError(f"MLMESH_SERVE: {error}") from None
        rows_max = _count(settings.environ, "MLMESH_BATCH_ROWS_MAX")
        preferred = _count(settings.environ, "MLMESH_BATCH_ROWS_PREFERRED")
        if cpus is None:
            cpus = len(os.sched_getaffinity(0))
        return cls(
            selectors=selectors,
            engine=_choice(settings.environ, "MLMESH_ENGINE", ENGINES),
            precision=_choice(settings.environ, "MLMESH_PRECISION", ("", "fp32", "bf16", "fp16")),
            tuning=_choice(settings.environ, "MLMESH_ENGINE_TUNING", ("background", "load", "off")),
            rows_max=rows_max,
            rows_preferred=min(preferred, rows_max),
            rows_said=bool(settings.environ.get("MLMESH_BATCH_ROWS_PREFERRED", "").strip()),
            concurrency_said=bool(settings.environ.get("MLMESH_ENGINE_CONCURRENCY", "").strip()),
            queue_items_max=_count(settings.environ, "MLMESH_QUEUE_ITEMS_MAX"),
            limiter=_choice(settings.environ, "MLMESH_CONCURRENCY_LIMIT", ("gradient", "off")) == "gradient",
            concurrency=_count(settings.environ, "MLMESH_ENGINE_CONCURRENCY", default=max(1, min(4, cpus))),
            threads=_count(settings.environ, "MLMESH_ENGINE_THREADS"),
            model_trial=_choice(settings.environ, "MLMESH_MODEL_TRIAL", ("1", "0")) == "1",
            model_bytes_max=_count(settings.environ, "MLMESH_MODEL_MIB_MAX") << 20,
            memory_bytes=_count(settings.environ, "MLMESH_MEMORY_MIB", default=0) << 20,
            stream_age_s=_seconds(settings.environ, "MLMESH_STREAM_AGE_S"),
            stream_key=_key(settings.environ, "MLMESH_STREAM_KEY"),
            protocol=ProtocolSettings.from_environ(settings.environ),
        )


def _count(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    variable = next(variable for variable in VARIABLES if variable.name == name)
    text = environ.get(name, "").strip() or variable.default
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 20):
        raise ConfigError(f"{name}: expected a number from 1 to {(1 << 20) - 1}; got {text!r}")
    return int(text)


def _choice(environ: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """One of some words, the first of them by default."""
    text = environ.get(name, "").strip().lower() or choices[0]
    if text not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {text!r}")
    return text


def _seconds(environ: Mapping[str, str], name: str) -> float:
    text = environ.get(name, "").strip() or "0"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name}: expected seconds, 0 or more; got {text!r}")
    return value


def _key(environ: Mapping[str, str], name: str) -> bytes:
    path = environ.get(name, "").strip()
    if not path:
        return b""
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from None
    if len(key) < _KEY_BYTES_MIN:
        raise ConfigError(f"{name}: expected a file of {_KEY_BYTES_MIN} bytes or more; {path} has {len(key)}")
    return key
