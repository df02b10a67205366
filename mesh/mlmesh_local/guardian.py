"""Keeps a guardian beside the supervisor; see `mlmesh_local._guardian`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from mlmesh_local.backoff import Backoff
from mlmesh_local.process import MARK

_PROGRAM = Path(__file__).with_name("_guardian.py")


async def guard(state_dir: Path) -> None:
    """Keep a guardian running until cancelled; then it is ended without having done anything."""
    # Nothing is ever written: the other end sees the end of the pipe when this process is gone.
    reading, writing = os.pipe()
    backoff = Backoff()
    try:
        while True:
            await _one(state_dir, reading)
            await asyncio.sleep(backoff.next_delay_s(0.0))
    finally:
        os.close(reading)
        os.close(writing)


async def _one(state_dir: Path, descriptor: int) -> None:
    mark = f"{MARK}={state_dir}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        str(_PROGRAM),
        mark,
        stdin=descriptor,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={MARK: str(state_dir)},
        start_new_session=True,
    )
    try:
        await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
