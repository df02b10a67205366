"""What MLflow's files, tags, aliases, metrics and signatures are here. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.mlflow import RemoteFile, flavours

MLMODEL = "MLmodel"
_BESIDE_BYTES_MAX = 1 << 24
LABELS_MAX, _METRICS_MAX = 64, 256
_KEY_CHARS_MAX, _VALUE_CHARS_MAX, TEXT_CHARS_MAX = 128, 4096, 65536
PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
_MODEL_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_ALIAS_ID = re.compile(r"[a-z][a-z0-9-]{0,62}", re.ASCII)
# Loading any of these runs what is in it.
_PICKLES = (
    ".pkl",
    ".pickle",
    ".cloudpickle",
    ".joblib",
    ".dill",
    ".pt",
    ".pt2",
    ".pth",
    ".bin",
    ".ckpt",
    ".npy",
    ".npz",
)
MEDIA_TYPES = {".onnx": "application/onnx", ".json": "application/json", ".txt": "text/plain"}
_DATATYPES = {
    "bool": "BOOL", "boolean": "BOOL",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "integer": "INT32", "long": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "float": "FP32", "double": "FP64",
    "str": "BYTES", "string": "BYTES", "binary": "BYTES", "object": "BYTES", "bytes": "BYTES",
}  # fmt: skip


def choose(mlmodel: Mapping[str, Any], files: Sequence[RemoteFile]) -> tuple[Sequence[RemoteFile], str, Sequence[str]]:
    """Files to take over, the path of the ONNX file among them ("" for none), and why others are left out.

    Raises:
        CliError: neither ONNX nor safetensors is among them; pickles are named.
    """
    by_path = {file.path: file for file in files}
    onnx = next((str(facts.get("data", "")) for name, facts in flavours(mlmodel) if name == "onnx"), "")
    if onnx and onnx not in by_path:
        raise CliError(f"the MLmodel file names {onnx!r}, which is not there", "log the model again in MLflow")
    wanted = {onnx} if onnx else {file.path for file in files if file.path.endswith(".safetensors")}
    if not wanted:
        names = ", ".join(name for name, _ in flavours(mlmodel)) or "none"
        pickles = ", ".join(file.path for file in files if _is_pickle(file.path))
        why = f"; {pickles} would run whatever is in it when it is loaded" if pickles else ""
        raise CliError(
            f"it has neither an ONNX nor a safetensors flavour (flavours: {names}){why}",
            "log it in MLflow with mlflow.onnx.log_model, then import that",
            reason="FORMAT_NOT_ALLOWED",
        )
    left_out = []
    for file in files:
        if file.path in wanted:
            continue
        if _is_pickle(file.path):
            left_out.append(f"{file.path}: a pickle, or may be one")
        elif file.path != MLMODEL and not file.path.endswith((".json", ".txt")):
            # Tensors of an ONNX file may lie in a file beside it; they are taken into it when it is fetched.
            inside = ", unless it holds tensors of the ONNX file" if onnx else ""
            left_out.append(f"{file.path}: not ONNX, safetensors, JSON or text{inside}")
        elif file.size_bytes > _BESIDE_BYTES_MAX:
            left_out.append(f"{file.path}: larger than {_BESIDE_BYTES_MAX} bytes")
        elif not file.size_bytes:
            left_out.append(f"{file.path}: empty")
        elif not PATH.fullmatch(file.path):
            left_out.append(f"{file.path!a}: no name for a file here")
        else:
            wanted.add(file.path)
    return [by_path[path] for path in sorted(wanted)], onnx, left_out


def signature_of(mlmodel: Mapping[str, Any]) -> pb.ModelSignature:
    """Inputs and outputs as MLflow's signature tells them; what has no datatype here is left out."""
    found = mlmodel.get("signature")
    signature = pb.ModelSignature()
    if not isinstance(found, Mapping):
        return signature
    for side, into in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        try:
            specs = json.loads(found.get(side) or "[]")
        except (ValueError, TypeError):
            continue
        for position, spec in enumerate(specs if isinstance(specs, list) else []):
            if isinstance(spec, dict) and (tensor := _tensor(spec, f"{side.removesuffix('s')}_{position}")) is not None:
                into.append(tensor)
    return signature


def _tensor(spec: Mapping[str, Any], default: str) -> pb.TensorSpec | None:
    """One entry of MLflow's signature: a tensor with its shape, or a column, which is a batch of values."""
    inner = spec.get("tensor-spec")
    kind = str(inner.get("dtype") if isinstance(inner, dict) else spec.get("type"))
    shape = inner.get("shape") if isinstance(inner, dict) else [-1]
    # NumPy spells text of at most five characters "<U5".
    datatype = "BYTES" if kind.startswith(("<U", "|S")) else _DATATYPES.get(kind)
    if datatype is None or not isinstance(shape, list) or not all(isinstance(d, int) and d >= -1 for d in shape):
        return None
    return pb.TensorSpec(name=str(spec.get("name") or default)[:256], datatype=datatype, shape=shape)


def model_id_of(name: str) -> str:
    """An id for a name of MLflow's: "My Model" becomes my-model. Raises CliError (exit code 2) when nothing is left."""
    made = _slug(name)
    if not _MODEL_ID.fullmatch(made):
        raise usage_error(f"{name!r} makes no model id", "name one with --as")
    return made


def path_of(path: str) -> str:
    """A path as it may be here. Raises CliError for one that may not."""
    if not PATH.fullmatch(path) or len(path) > 255:
        raise CliError(f"{path!a} is no name for a file here", "log the model under another name in MLflow")
    return path


def _is_pickle(path: str) -> bool:
    return path.lower().endswith(_PICKLES)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")


def labels_of(tags: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Labels of tags, and why others are none."""
    labels: dict[str, str] = {}
    left_out = []
    for key, value in tags.items():
        if key.startswith("mlflow."):
            # MLflow's own bookkeeping.
            continue
        if not key or len(key) > _KEY_CHARS_MAX or len(value) > _VALUE_CHARS_MAX or "\0" in key + value:
            left_out.append(f"tag {key[:40]!a}: too long for a label")
        elif len(labels) >= LABELS_MAX:
            left_out.append(f"tag {key[:40]!a}: more than {LABELS_MAX} labels")
        else:
            labels[key] = value
    return labels, left_out


def metrics_of(found: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Metrics that are figures, and why others are left out."""
    metrics: dict[str, float] = {}
    left_out = []
    for name, value in found.items():
        if not math.isfinite(value):
            left_out.append(f"metric {name[:40]!a}: {value} is no figure")
        elif not name or len(name) > _KEY_CHARS_MAX or len(metrics) >= _METRICS_MAX:
            left_out.append(f"metric {name[:40]!a}: its name is too long, or there are more than {_METRICS_MAX}")
        else:
            metrics[name] = value
    return metrics, left_out


def aliases_of(found: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Aliases as they are spelled here, and why others are left out."""
    made = {alias: _slug(alias) for alias in found}
    left_out = [f"alias {alias!a}: makes no alias here" for alias, id_ in made.items() if not _ALIAS_ID.fullmatch(id_)]
    return tuple(sorted({id_ for id_ in made.values() if _ALIAS_ID.fullmatch(id_)})), left_out
