"""An inference server as a process whose streams move: `python tests/support/moving_process.py VERSION [FILE_OF_KEY]`.

Model "echo": y is x, FP32 [-1,-1], answered by version VERSION. Model "sum": see special_models.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mlmesh_inference.catalog import Catalog
from mlmesh_inference.oip.stream import Streaming
from mlmesh_inference.tokens import Tokens
from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import run
from tests.support.inference import inference_server, open_streams, ready_model
from tests.support.inference_process import Echo
from tests.support.special_models import summing_model

VERSION = int(sys.argv[1])
KEY = Path(sys.argv[2]).read_bytes() if len(sys.argv) > 2 else b""


async def main(settings: Settings) -> None:
    """Serve until told to stop."""
    catalog = Catalog()
    streaming = Streaming(catalog=catalog, open=open_streams(), tokens=Tokens(KEY), hold_s=1.0)
    models = (ready_model(Echo(), name="echo", version=VERSION), summing_model())
    server = inference_server(
        *models, catalog=catalog, streaming=streaming, listen=settings.listen, transport=settings.transport, grace_s=5.0
    )
    async with server as serving:
        await serving.serve_until_signal()


if __name__ == "__main__":
    run(main, service="inference")
