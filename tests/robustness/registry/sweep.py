"""Kills the publisher's story at every call that changes a file, and around every transaction, one after the other.

`python sweep.py FOLDER [FROM [STEP]]`: for each point a child of this process tells the story (see story.py) in a
folder of its own and is killed right before its Nth such call; another opens what is left, checks it, tells the story
again and checks once more. One JSON object a point on stdout; the last says that the story came to its end. Forked, not
started: a point costs what the story costs, and not the imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlmesh_registry import database
from mlmesh_registry.registry import open_registry
from tests.robustness.registry import story

CALLS = ("open", "pwrite", "fsync", "ftruncate", "link", "unlink", "mkdir")
POINTS_MAX = 2000


class Countdown:
    """Kills this process at the Nth point; what it was about to do is told first."""

    def __init__(self, points: int) -> None:
        self._left = points
        self._lock = threading.Lock()

    def point(self, name: str) -> None:
        """Pass a point, or not."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.write(1, json.dumps(["killed", name]).encode() + b"\n")
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Put points before every call that changes a file, and before and after every transaction that writes."""
        for name in CALLS:
            setattr(os, name, self._before(name, getattr(os, name)))
        transact, reads = database._transact, database._nothing

        def counted(engine: Any, begin: Any, *arguments: Any) -> Any:
            if begin is reads:
                return transact(engine, begin, *arguments)
            self.point("begin")
            result = transact(engine, begin, *arguments)
            self.point("committed")
            return result

        database._transact = counted

    def _before(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                self.point(name)
            return call(*arguments, **keywords)

        return counted


def _forked(work: Callable[[], None]) -> tuple[int, list[list[Any]]]:
    """Run work in a child whose stdout is read; its exit status and the whole lines it wrote."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), [json.loads(line) for line in lines if line.endswith(b"\n")]


def _tell(data_dir: Path, points: int) -> None:
    Countdown(points).install()
    asyncio.run(story.main(data_dir))


async def _check(data_dir: Path, acknowledged: list[list[Any]]) -> None:
    async with open_registry(data_dir, story.SETTINGS) as registry:
        await story.check(registry, data_dir, acknowledged)
        # A digest that was collected may come again; the same requests are done once, whatever was done before.
        lasting = [fact for fact in acknowledged if fact[0] != "cancelled"]
        await story.retell(registry, lambda *fact: lasting.append(list(fact)))
        assert not [fact for fact in lasting if fact[0] == "error"], lasting
        await story.check(registry, data_dir, lasting)
        assert (await registry.store.get_model("m")).latest_version == story.VERSIONS


async def _migrated(data_dir: Path) -> None:
    async with open_registry(data_dir, story.SETTINGS):
        pass


def main(folder: Path, first: int, step: int) -> None:
    """Sweep."""
    template = folder / "template"
    assert _forked(lambda: asyncio.run(_migrated(template)))[0] == 0
    # Nothing is left to migrate, and looking whether there is takes longer than the story.
    database.Database.migrate = lambda _self: None  # type: ignore[method-assign]
    gc.freeze()
    for points in range(first, POINTS_MAX, step):
        data_dir = folder / str(points)
        shutil.copytree(template, data_dir)
        code, told = _forked(lambda: _tell(data_dir, points))  # noqa: B023  it runs before the next turn
        killed = [fact[1] for fact in told if fact[0] == "killed"]
        told = [fact for fact in told if fact[0] != "killed"]
        checked, _ = _forked(lambda: asyncio.run(_check(data_dir, told)))  # noqa: B023
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(data_dir)
        result = {"point": points, "before": killed[0] if killed else "", "exit": code, "whole": checked == 0}
        os.write(1, json.dumps(result).encode() + b"\n")
        if not killed:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(each) for each in [*sys.argv[2:4], "1", "1"][:2]))
