"""One process of a distributed fitting."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from mlmesh_training.backends.base import Died
from mlmesh_training.trainer.fitting.pausing import Flag, PauseRequested
from mlmesh_training.trainer.fitting.ranks import Ranks, device, settle
from mlmesh_training.trainer.fitting.wires import Silent, Wires
from mlmesh_training.trainer.reporter import PermanentError, Reporter

DONE, PAUSED = "done", "paused"
SCRATCH = "workers"
"""Folder in the job's: where workers meet."""
_CAUSE_S = 10.0
"""How long a worker that lost another one leaves the agent to find the cause before it ends too."""


def work(folder: Path, threads: int, wires: Wires, pause: Flag, collective_s: float) -> str:
    """Fit as the rank that torch elastic's environment variables tell; DONE or PAUSED.

    It ends the process with code 1, and with a report of why, when that does not work out.
    """
    from mlmesh_training.trainer.__main__ import die_with  # noqa: PLC0415 - light, but it imports reports too

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    reporter = wires.attach(local_rank)
    if not die_with(os.getppid()):
        os._exit(1)
    try:
        with joined(folder / SCRATCH, collective_s=collective_s) as ranks:
            return _fit(folder, threads, ranks, reporter if ranks.first else Silent(), pause)
    except PauseRequested:
        return PAUSED
    except PermanentError as error:
        reporter.send(Died(reason=str(error), permanent=True))
    except Exception as error:
        if _waited(error):
            reporter.send(Died(reason=f"rank {rank}: another process has not answered for {collective_s:g} s"))
        elif _lost_another(error):
            time.sleep(_CAUSE_S)
        else:
            traceback.print_exc()
            reporter.send(Died(reason=f"rank {rank}: {type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def joined(scratch: Path, *, collective_s: float) -> Iterator[Ranks]:
    """Join the other processes; NCCL between GPUs, gloo between processors.

    On one machine they meet in a file of `scratch`, and talk over the loopback interface alone. On several they meet
    where MASTER_ADDR and MASTER_PORT say.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    where = device(local_rank=local_rank, local_world=local_world)
    store = None
    if world == local_world:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        meeting = scratch / f"meeting-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = FileStore(str(meeting), world)
    dist.init_process_group(
        "nccl" if where.type == "cuda" else "gloo",
        init_method=None if store else "env://",
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=collective_s),
        device_id=where if where.type == "cuda" else None,
    )
    try:
        yield Ranks(rank=rank, world=world, device=where)
    finally:
        # A process that lost another one must not wait for it here.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _fit(folder: Path, threads: int, ranks: Ranks, reporter: Reporter, pause: Flag) -> str:
    from mlmesh_training.trainer import run  # noqa: PLC0415 - it imports the way in, which imports this
    from mlmesh_training.trainer.fitting import start  # noqa: PLC0415

    settle(threads)
    task = run.read_task(folder)
    definition, loaded = run.load(folder, task)
    start.fit(folder, task, definition, loaded, reporter, ranks=ranks, pause=pause)
    return DONE


def _waited(error: Exception) -> bool:
    """Whether another process did not do its part in time; gloo says it in several ways."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def _lost_another(error: Exception) -> bool:
    """Whether another process's end is what is told here, which is not the cause."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "closed by peer" in str(error)
