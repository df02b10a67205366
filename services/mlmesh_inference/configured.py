"""What a configuration makes of a model: the signature that is served, bounds, labels, samples to warm up with.

The model's own signature is the truth. A configuration may say less, may narrow a free dimension, may make an optional
input required or forbid batching; where it says something else, the version is refused with both sides in the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from mlmesh_inference.serving import Fill, SampleInput, ServingConfig, TensorConfig, WarmupSample
from mlmesh_inference.tensors import (
    DATATYPES,
    Array,
    Signature,
    TensorSpec,
    decode_raw,
    element_count,
    object_array,
    show,
)
from mlmesh_runtime.errors import MeshError

LABELS_FILE: Final = "labels.txt"
"""File of a version with one label a line, for outputs whose configuration names no other."""
LABELS_BYTES_MAX: Final = 16 << 20
SAMPLE_BYTES_MAX: Final = 256 << 20
"""Most bytes of one input of a warm-up sample."""

_SEED: Final = 0


class ConfigError(Exception):
    """The configuration does not go with the model. The text is for whoever published it."""


def served_signature(config: ServingConfig, signature: Signature) -> Signature:
    """The model's signature as the configuration narrows it. Raises ConfigError."""
    batches = batched(config, signature)
    return Signature(
        inputs=_served("input", config.inputs, signature.inputs, batches=batches),
        outputs=_served("output", config.outputs, signature.outputs, batches=batches),
    )


def batched(config: ServingConfig, signature: Signature) -> bool:
    """Whether requests of the model run together. Raises ConfigError when it is asked for and cannot be."""
    if config.rows_max:
        if not signature.batches:
            raise ConfigError(
                f"max_batch_size is {config.rows_max}, but the model has no free first dimension in every tensor"
            )
        return True
    return signature.batches and config.rows_max is None and not _full_rank(config, signature)


def _full_rank(config: ServingConfig, signature: Signature) -> bool:
    """Whether the dims leave no batch dimension out: written for a model that is not to batch."""
    found = {spec.name: len(spec.shape) for spec in (*signature.inputs, *signature.outputs)}
    said = [tensor for tensor in (*config.inputs, *config.outputs) if tensor.name in found and tensor.dims]
    return bool(said) and all(len(tensor.dims) == found[tensor.name] for tensor in said)


def _served(
    kind: str, said: Sequence[TensorConfig], found: Sequence[TensorSpec], *, batches: bool
) -> tuple[TensorSpec, ...]:
    wanted = {tensor.name: tensor for tensor in said}
    if unknown := sorted(wanted.keys() - {spec.name for spec in found}):
        names = [spec.name for spec in found]
        raise ConfigError(f"the configuration says {kind} '{unknown[0]}', the model has {names}")
    return tuple(
        _narrowed(kind, wanted[spec.name], spec, batches=batches) if spec.name in wanted else spec for spec in found
    )


def _narrowed(kind: str, said: TensorConfig, spec: TensorSpec, *, batches: bool) -> TensorSpec:
    if said.datatype not in {"", spec.datatype.name}:
        raise ConfigError(
            f"the configuration says {kind} '{spec.name}' is {said.datatype}, the model says {spec.datatype.name}"
        )
    if said.optional and not spec.optional:
        raise ConfigError(f"the configuration says input '{spec.name}' is optional, the model cannot do without it")
    shape = spec.shape
    if said.dims:
        shape = (*spec.shape[:1], *said.dims) if batches else said.dims
        fits = len(shape) == len(spec.shape) and all(
            own in (-1, dim) for own, dim in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"the configuration says {kind} '{spec.name}' has dims {show(said.dims)}"
                f"{' beside the batch dimension' if batches else ''}, the model says {show(spec.shape)}"
            )
    optional = spec.optional and (said.optional or kind == "output")
    return dataclasses.replace(spec, shape=tuple(shape), optional=optional)


def rows_bounds(config: ServingConfig, *, rows_max: int, rows_preferred: int) -> tuple[int, int]:
    """(most rows, preferred rows) of a batch, from the configuration and the process's own. Raises ConfigError."""
    most = config.rows_max or rows_max
    if most > rows_max:
        raise ConfigError(f"max_batch_size is {most}, this process allows {rows_max} (MLMESH_BATCH_ROWS_MAX)")
    said = config.batching.preferred_rows if config.batching else ()
    if any(rows > most for rows in said):
        raise ConfigError(f"preferred_batch_size is {max(said)}, above the max_batch_size of {most}")
    return most, min(max(said, default=rows_preferred), most)


def read_labels(folder: Path, config: ServingConfig) -> dict[str, tuple[str, ...]]:
    """Labels by output, "" for outputs without a file of their own. Blocking. Raises ConfigError."""
    files = {tensor.name: tensor.labels_file for tensor in config.outputs if tensor.labels_file}
    labels = {"": _lines(folder / LABELS_FILE)} if (folder / LABELS_FILE).exists() else {}
    for output, file in files.items():
        if not (folder / file).is_file():
            raise ConfigError(f"label_filename of output '{output}': the version has no file {file!r}")
        labels[output] = _lines(folder / file)
    return labels


def _lines(path: Path) -> tuple[str, ...]:
    if path.stat().st_size > LABELS_BYTES_MAX:
        raise ConfigError(f"{path.name}: expected at most {LABELS_BYTES_MAX} bytes of labels")
    return tuple(path.read_text().splitlines())


def sample(said: WarmupSample, signature: Signature, folder: Path, *, batches: bool) -> dict[str, Array]:
    """The inputs of a warm-up sample, rows repeated to its batch size. Blocking. Raises ConfigError."""
    specs = {spec.name: spec for spec in signature.inputs}
    inputs = {entry.name: entry for entry in said.inputs}
    required = {spec.name for spec in signature.inputs if not spec.optional}
    if not required <= inputs.keys() <= specs.keys():
        raise ConfigError(f"model_warmup '{said.name}' gives inputs {sorted(inputs)}, the model has {sorted(specs)}")
    if batches != bool(said.rows):
        wrong = "needs a batch_size of 1 or more" if batches else "has a batch_size, but the model does not batch"
        raise ConfigError(f"model_warmup '{said.name}' {wrong}")
    return {name: _filled(said, inputs[name], specs[name], folder) for name in inputs}


def _filled(said: WarmupSample, entry: SampleInput, spec: TensorSpec, folder: Path) -> Array:
    at = f"model_warmup '{said.name}', input '{entry.name}'"
    if entry.datatype != spec.datatype.name:
        raise ConfigError(f"{at} is {entry.datatype}, the model says {spec.datatype.name}")
    rows = (said.rows,) if said.rows else ()
    shape = (*rows, *entry.dims)
    kind = DATATYPES[entry.datatype]
    if element_count(shape, tensor=entry.name) * (kind.itemsize or 1) > SAMPLE_BYTES_MAX:
        raise ConfigError(f"{at}: expected at most {SAMPLE_BYTES_MAX} bytes, got shape {show(shape)}")
    if entry.fill is Fill.FILE:
        path = folder / entry.file
        if not path.is_file() or path.stat().st_size > SAMPLE_BYTES_MAX:
            raise ConfigError(f"{at}: the version has no such file {entry.file!r}, or one above the bound")
        try:
            one = decode_raw(kind, entry.dims, path.read_bytes(), tensor=entry.name, model=said.name)
        except MeshError as error:
            raise ConfigError(f"{at}: {error.message}") from None
        return np.ascontiguousarray(np.broadcast_to(one, shape))
    if kind.itemsize == 0:
        return object_array([b""] * element_count(shape, tensor=entry.name), shape)
    if entry.fill is Fill.ZEROS:
        return np.zeros(shape, kind.dtype)
    random = np.random.default_rng(_SEED)
    if kind.dtype.kind == "f":
        return random.random(shape).astype(kind.dtype)
    if kind.name == "BF16":
        return (random.random(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return random.integers(0, 2, shape).astype(kind.dtype)


def labels_of(labels: Mapping[str, tuple[str, ...]], output: str) -> tuple[str, ...]:
    """Labels of an output: its own, else those of every output, else none."""
    return labels.get(output, labels.get("", ()))
