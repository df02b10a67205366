"""Imported by the server that workers are forked from, and by nothing else: all that they need, loaded once.

The server dies with the agent, and its workers with it: it tells the kernel so.
"""

from __future__ import annotations

import os

import torch._dynamo  # noqa: F401 - optimizers import it, which takes a second

from mlmesh_training.trainer import __main__ as entry
from mlmesh_training.trainer import run  # noqa: F401
from mlmesh_training.trainer.fitting import worker  # noqa: F401

entry.die_with(os.getppid())
