"""`python -m mlmesh_inference`: an inference process."""

from mlmesh_runtime.server import run

from mlmesh_inference.app import serve

if __name__ == "__main__":
    run(serve, service="inference")
