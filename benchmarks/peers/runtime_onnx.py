"""What runs a model inside of a peer: ONNX Runtime, one thread a session. Used in foreign environments: numpy and
onnxruntime only.
"""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any

import numpy as np
import onnxruntime as ort


class Model:
    """A model file with as many sessions as BENCH_SESSIONS says (one by default), taken in turn."""

    def __init__(self, path: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        count = int(os.environ.get("BENCH_SESSIONS", "1"))
        providers = ["CPUExecutionProvider"]
        self._sessions = [ort.InferenceSession(path, options, providers=providers) for _ in range(count)]
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self.inputs = [(node.name, node.type) for node in self._sessions[0].get_inputs()]
        self.output = self._sessions[0].get_outputs()[0].name

    def run(self, feed: dict[str, Any]) -> np.ndarray:
        """One batch: arrays [rows, ...] in, one array [rows, ...] out."""
        with self._lock:
            session = self._sessions[next(self._turn) % len(self._sessions)]
        result: np.ndarray = session.run([self.output], feed)[0]
        return result
