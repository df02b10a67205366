"""Trials in a process of their own: at low priority, within limits, killed when nobody wants them any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.selection import REFERENCE, Trial
from mlmesh_inference.engines.trial import TrialOrder, order_to_json
from mlmesh_inference.engines.verdicts import VerdictStore, verdict_key

COMMAND: Final = (sys.executable, "-m", "mlmesh_inference.engines.trial")
CPU_S: Final = 600
"""CPU time of one trial."""
PROOF_CPU_S: Final = 60
"""CPU time of loading a file and running it once."""
MEMORY_BYTES: Final = 16 << 30
"""Data of one trial; a model's own weights are four times in it."""
TIME_S: Final = 1200.0
DIED: Final = "died"
"""Engine of a trial that took its process with it."""
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
        start_new_session=True,  # Ctrl-C at a terminal is for the server, which then ends this
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    document = {"order": order_to_json(order), "cpu_s": cpu_s, "memory_bytes": memory_bytes}
    try:
        async with asyncio.timeout(time_s):
            answer, errors = await _talk(process, json.dumps(document).encode())
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


async def _talk(process: asyncio.subprocess.Process, said: bytes) -> tuple[bytes, bytes]:
    """Say it, and read what comes; a process that says more than it may is killed."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise RuntimeError("the process was started with all three pipes")
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr

    async def say() -> None:
        with contextlib.suppress(ConnectionError):  # it died; its end tells more
            stdin.write(said)
            await stdin.drain()
            stdin.close()

    async def read(stream: asyncio.StreamReader, most: int) -> bytes:
        data = bytearray()
        while piece := await stream.read(1 << 16):
            data += piece
            if len(data) > most:
                process.kill()
                break
        return bytes(data[:most])

    async with asyncio.TaskGroup() as group:
        group.create_task(say())
        answer = group.create_task(read(stdout, ANSWER_BYTES_MAX))
        errors = group.create_task(read(stderr, ANSWER_BYTES_MAX))
    await process.wait()
    return answer.result(), errors.result()


class Prover:
    """Says of files whether they may be loaded in this process; each new one is run in a process of its own first.

    Args:
        store: where verdicts are kept, by digest. at_once: processes at a time. cpu_s: CPU time of each.
    """

    def __init__(self, store: VerdictStore, *, at_once: int = 2, cpu_s: int = PROOF_CPU_S) -> None:
        self._store = store
        self._cpu_s = cpu_s
        self._room = asyncio.Semaphore(at_once)

    async def __call__(self, model: Path, digest: str) -> str:
        """Why the file may not be loaded, "" when it may. A model that merely refuses a made-up request is harmless."""
        async with self._room:
            trial = await prove(model, digest, self._store, cpu_s=self._cpu_s)
        return trial.reason if trial.engine == DIED else ""


async def prove(
    model: Path, digest: str, store: VerdictStore, *, cpu_s: int = PROOF_CPU_S, memory_bytes: int = MEMORY_BYTES
) -> Trial:
    """Load a file that was never seen before and run it once, in a process of its own: what harms it harms nobody else.

    Blocks on the store's small file. The verdict is kept by the file's digest: `accepted`, or the reason why not.

    Args:
        model: the ONNX file. digest: its SHA-256.
    """
    key = verdict_key({"proof": digest, "engine": REFERENCE, "cpu_s": cpu_s, "memory_bytes": memory_bytes})
    known = store.get(key)
    if known is not None:
        return known[0]
    order = TrialOrder(model=model, candidates=(), rows_max=1, rows_preferred=1, timing_s=0.0)
    try:
        trials = await try_in_child(order, cpu_s=cpu_s, memory_bytes=memory_bytes, time_s=4.0 * cpu_s)
    except EngineError as error:
        trials = (Trial(engine=DIED, precision="", reason=str(error)),)
    with contextlib.suppress(OSError):
        store.put(key, trials[:1])
    return trials[0]


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
