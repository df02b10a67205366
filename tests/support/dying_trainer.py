"""The trainer, whose workers die where the test planned it."""

from __future__ import annotations

import os
import sys

from mlmesh_training.trainer.__main__ import main
from mlmesh_training.trainer.fitting import forking

if __name__ == "__main__":
    forking.PRELOADED.append("tests.support.dying_worker")
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
