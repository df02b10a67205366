"""An inference server as a process, whose one model takes its time: `python tests/support/timed_process.py`.

Model "timed": y is x, FP32 [-1,4]; a batch takes 40 ms and 20 ms a row, asleep, so neighbours on the machine do not
change how much it can do. Two instances of batches of four: about 67 rows a second.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mlmesh_inference.engines.base import EngineFacts
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec
from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import run
from tests.support.inference import inference_server, ready_model


class Timed:
    """The model."""

    name = "timed"
    concurrency = 2
    facts = EngineFacts(precision="fp32")
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype=DATATYPES["FP32"], shape=(-1, 4)),),
        outputs=(TensorSpec(name="y", datatype=DATATYPES["FP32"], shape=(-1, 4)),),
    )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """x, later."""
        x = inputs["x"]
        time.sleep(0.040 + 0.020 * len(x))
        return [x for _ in outputs]

    def close(self) -> None:
        """Nothing to close."""


async def main(settings: Settings) -> None:
    """Serve until told to stop."""
    model = ready_model(Timed(), name="timed", rows_preferred=4)
    async with inference_server(model, listen=settings.listen, transport=settings.transport) as server:
        await server.serve_until_signal()


if __name__ == "__main__":
    run(main, service="inference")
