"""`python -m mlmesh_inference`: an inference process."""

from mlmesh_inference.app import serve
from mlmesh_runtime.server import run

if __name__ == "__main__":
    run(serve, service="inference")
