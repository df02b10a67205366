"""Trials in a process of their own: at low priority, within limits, killed when nobody wants them any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.selection import Trial
from mlmesh_inference.engines.trial import TrialOrder, order_to_json

COMMAND: Final = (sys.executable, "-m", "mlmesh_inference.engines.trial")
CPU_S: Final = 600
"""CPU time of one trial."""
MEMORY_BYTES: Final = 16 << 30
"""Data of one trial; a model's own weights are four times in it."""
TIME_S: Final = 1200.0
ANSWER_BYTES_MAX: Final = 4 << 20


async def try_in_child(
    order: TrialOrder,
    *,
    cpu_s: int = CPU_S,
    memory_bytes: int = MEMORY_BYTES,
    time_s: float = TIME_S,
    command: tuple[str, ...] = COMMAND,
) -> tuple[Trial, ...]:
    """Try engines; see trial.try_engines. Raises EngineError when the process dies or is out of bounds.

    Cancelling kills the process.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=ANSWER_BYTES_MAX,
        start_new_session=True,  # Ctrl-C at a terminal is for the server, which then ends this
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    document = {"order": order_to_json(order), "cpu_s": cpu_s, "memory_bytes": memory_bytes}
    try:
        async with asyncio.timeout(time_s):
            answer, errors = await process.communicate(json.dumps(document).encode())
    except TimeoutError:
        raise EngineError(f"trying engines took longer than {time_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        return tuple(Trial.from_json(each) for each in json.loads(answer))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EngineError(_obituary(process.returncode, errors)) from None


def _obituary(code: int | None, errors: bytes) -> str:
    """How it died, for a person."""
    if code is not None and code < 0:
        how = f"signal {signal.Signals(-code).name}"
        if -code == signal.SIGXCPU:
            how += ", out of CPU time"
    else:
        how = f"exit status {code}"
    last = errors.decode(errors="replace").strip().splitlines()[-1:]
    return f"the process that tried the model died ({how})" + (f": {last[0][:500]}" if last else "")
