"""The compiler of engines, in a process of its own for each build.

Blocking: call it on an executor with one thread, and builds come one after the other.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_compile import BuildCancelled, PlanFacts, PlanOptions, Step
from mlmesh_inference.engines.tensorrt_worker import CANCEL

_LOG = logging.getLogger(__name__)

CANCEL_GRACE_S: Final = 2.0
"""Time that a compiler has to stop by itself before it is killed."""
_STDERR_BYTES_MAX: Final = 4000
_LINE_CHARS_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOrder:
    """What to compile, for what, and where the plan goes.

    Attributes:
        model: the ONNX file. plan: the file that is written.
        flavour, version: of the TensorRT that must do it. gpu: ordinal, or -1 without one.
    """

    model: Path
    plan: Path
    options: PlanOptions
    flavour: str
    version: str
    gpu: int = -1


class Stop:
    """Asks a compiler to stop, from any thread, before or while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._act: Callable[[], None] | None = None

    @property
    def asked(self) -> bool:
        """Whether somebody asked."""
        return self._asked

    def ask(self) -> None:
        """Ask. Safe to repeat."""
        with self._lock:
            self._asked, act = True, self._act
        if act is not None:
            act()

    def bind(self, act: Callable[[], None] | None) -> None:
        """What asking does from now on; it is done at once when somebody has asked already."""
        with self._lock:
            self._act, asked = act, self._asked
        if asked and act is not None:
            act()


def compile_in_child(
    order: CompileOrder,
    step: Callable[[Step], None],
    stop: Stop,
    *,
    grace_s: float = CANCEL_GRACE_S,
    worker: tuple[str, ...] = (sys.executable, "-m", "mlmesh_inference.engines.tensorrt_worker"),
) -> PlanFacts:
    """Compile in a process of its own; `step` is called on this thread.

    Raises EngineError, also when the process dies, and BuildCancelled.
    """
    if stop.asked:
        raise BuildCancelled("the build was cancelled before it began")
    with _Child(worker, grace_s) as child:
        child.say(json.dumps(_document(order)))
        stop.bind(child.cancel)
        try:
            end = child.follow(step)
        finally:
            stop.bind(None)
    if "facts" in end and not stop.asked:
        return PlanFacts.from_json(end["facts"])
    if stop.asked:
        raise BuildCancelled("the build was cancelled")
    raise EngineError(end.get("error") or child.obituary())


def _document(order: CompileOrder) -> dict[str, Any]:
    return {
        "model": str(order.model),
        "plan": str(order.plan),
        "options": asdict(order.options),
        "flavour": order.flavour,
        "version": order.version,
        "gpu": order.gpu,
    }


class _Child:
    """The process, its pipes, and its end."""

    def __init__(self, command: tuple[str, ...], grace_s: float) -> None:
        self._grace_s = grace_s
        self._killer: threading.Timer | None = None
        self._errors = b""
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at a terminal is for the server, which then ends this
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._reader = threading.Thread(target=self._drain, name="compiler-stderr", daemon=True)
        self._reader.start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._killer is not None:
                self._killer.cancel()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                _open(pipe).close()
        self._kill()
        self._process.wait()
        self._reader.join()
        _open(self._process.stderr).close()

    def say(self, line: str) -> None:
        """One line to it; nothing when it is gone."""
        with contextlib.suppress(OSError, ValueError):
            pipe = _open(self._process.stdin)
            pipe.write(line.encode() + b"\n")
            pipe.flush()

    def cancel(self) -> None:
        """Ask it to stop, and kill it when it does not."""
        with self._lock:
            if self._killer is None:
                self._killer = threading.Timer(self._grace_s, self._kill)
                self._killer.daemon = True
                self._killer.start()
        self.say(CANCEL)

    def follow(self, step: Callable[[Step], None]) -> dict[str, Any]:
        """Read its reports; returns the last one, empty when it ended without."""
        pipe = _open(self._process.stdout)
        while line := pipe.readline(_LINE_CHARS_MAX):
            try:
                report = json.loads(line)
            except ValueError:
                continue
            if "step" in report:
                phase, done, total = report["step"]
                step(Step(phase=str(phase), done=int(done), total=int(total)))
            else:
                return dict(report)
        self._process.wait()
        return {}

    def obituary(self) -> str:
        """How it died, for a person."""
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        last = self._errors.decode(errors="replace").strip().splitlines()[-1:]
        return f"the compiler's process died ({how})" + (f": {last[0][:500]}" if last else "")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _drain(self) -> None:
        pipe = _open(self._process.stderr)
        while data := pipe.read1(65536):  # type: ignore[attr-defined]
            self._errors = (self._errors + data)[-_STDERR_BYTES_MAX:]


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:  # the process was started with all three
        raise RuntimeError("the compiler's process has no pipes")
    return pipe
