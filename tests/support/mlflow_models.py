"""Run by MLflow's own Python: logs models into a server and registers them. `python mlflow_models.py URL WHAT...`

WHAT: onnx (with tags, aliases, metrics, a description), pickle (scikit-learn), tensors (safetensors files in a model
folder as the transformers flavour has them), big (an ONNX file of some MiB). Prints JSON: names and versions.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
from mlflow.models import Model, infer_signature
from onnx import TensorProto, helper, numpy_helper


def matrix(rows: int = 4, seed: int = 0) -> onnx.ModelProto:
    """y = x @ w"""
    values = np.random.default_rng(seed).standard_normal((rows, 2)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matrix",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(values, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def log_onnx(client: Any) -> dict[str, Any]:
    """Two versions of "My Digits"; the first is the champion."""
    name = "My Digits"
    for seed in range(2):
        with mlflow.start_run():
            mlflow.log_metrics({"accuracy": 0.5, "loss": 2.0})
            mlflow.log_metrics({"accuracy": 0.9 + seed / 100}, step=2)
            mlflow.log_metric("broken", float("nan"))
            signature = infer_signature(np.ones((2, 4), np.float32), np.ones((2, 2), np.float32))
            mlflow.onnx.log_model(matrix(seed=seed), name="model", registered_model_name=name, signature=signature)
    client.update_registered_model(name, description="digits of all kinds")
    client.set_registered_model_tag(name, "team", "vision")
    client.update_model_version(name, "1", description="the first one")
    client.set_model_version_tag(name, "1", "stage", 'it\'s "good" * 100 %')
    client.set_registered_model_alias(name, "Champion", "1")
    client.set_registered_model_alias(name, "12", "1")
    return {"name": name}


def log_pickle(client: Any) -> dict[str, Any]:
    """A scikit-learn model, which MLflow stores as a pickle."""
    from sklearn.linear_model import LinearRegression

    with mlflow.start_run():
        fitted = LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])
        mlflow.sklearn.log_model(
            fitted, name="model", registered_model_name="pickled", serialization_format="cloudpickle"
        )
    return {"name": "pickled"}


def log_tensors(client: Any) -> dict[str, Any]:
    """A folder as the transformers flavour writes it, registered from a run's files."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    with mlflow.start_run() as run, tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "encoder"
        (folder / "model").mkdir(parents=True)
        data = struct.pack("<Q", len(header)) + header + np.ones(2, np.float32).tobytes()
        (folder / "model" / "model.safetensors").write_bytes(data)
        (folder / "model" / "config.json").write_text('{"hidden": 2}')
        (folder / "model" / "training_args.bin").write_bytes(b"\x80\x04.")
        columns = infer_signature({"text": np.array(["a"])}, {"score": np.array([0.5])})
        made = Model(artifact_path="encoder", run_id=run.info.run_id, signature=columns)
        made.add_flavor("transformers", task="feature-extraction", model_binary="model")
        made.save(str(folder / "MLmodel"))
        mlflow.log_artifacts(str(folder), "encoder")
        client.create_registered_model("encoder")
        source = f"{run.info.artifact_uri}/encoder"
        client.create_model_version("encoder", source, run.info.run_id)
    return {"name": "encoder"}


def log_big(client: Any) -> dict[str, Any]:
    """An ONNX file of 24 MiB, so that a transfer can be cut in the middle."""
    with mlflow.start_run():
        mlflow.onnx.log_model(matrix(rows=3 << 20), name="model", registered_model_name="big")
    return {"name": "big"}


if __name__ == "__main__":
    mlflow.set_tracking_uri(sys.argv[1])
    own = mlflow.MlflowClient()
    kinds = {"onnx": log_onnx, "pickle": log_pickle, "tensors": log_tensors, "big": log_big}
    print(json.dumps({what: kinds[what](own) for what in sys.argv[2:]}))  # noqa: T201  it is its answer
