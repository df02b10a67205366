"""An inference server as a process, with one model and no registry: `python tests/support/inference_process.py`.

Model "echo": y is x, FP32 [-1,-1]; `t`, BYTES, and `i`, INT64, may come too and are not looked at. A row that holds 666
makes its batch fail; one that holds 667 makes the engine answer with one row too few.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mlmesh_inference.engines.base import EngineError, EngineFacts
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec
from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import run
from tests.support.inference import inference_server, ready_model


def spec(name: str, kind: str, *, optional: bool = False) -> TensorSpec:
    """A tensor of any width."""
    return TensorSpec(name=name, datatype=DATATYPES[kind], shape=(-1, -1), optional=optional)


class Echo:
    """The model."""

    name = "echo"
    concurrency = 1
    facts = EngineFacts(precision="fp32")
    signature = Signature(
        inputs=(spec("x", "FP32"), spec("t", "BYTES", optional=True), spec("i", "INT64", optional=True)),
        outputs=(spec("y", "FP32"),),
    )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """x, unless it is asked to fail."""
        x = inputs["x"]
        if (x == 666).any():
            raise EngineError("666")
        if (x == 667).any():
            return [x[1:] for _ in outputs]
        return [x for _ in outputs]

    def close(self) -> None:
        """Nothing to close."""


async def main(settings: Settings) -> None:
    """Serve until told to stop."""
    model = ready_model(Echo(), name="echo")
    async with inference_server(model, listen=settings.listen, transport=settings.transport) as server:
        await server.serve_until_signal()


if __name__ == "__main__":
    run(main, service="inference")
