"""The compiler's own process: `python -m mlmesh_inference.engines.tensorrt_worker`.

A compiler that crashes, or eats memory over a hostile model, ends here and takes nothing with it. The order is one line
of JSON on standard input; a second line, "cancel", asks it to stop, and the end of the input means that whoever asked
is gone. Lines of JSON on what was standard output tell steps and the end; what libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_api import flavour, load_module
from mlmesh_inference.engines.tensorrt_compile import BuildCancelled, PlanOptions, Step, Watch, compile_plan

CANCEL: Final = "cancel"
NICENESS: Final = 10
"""Answers come before compiling."""
OOM_SCORE: Final = 1000
"""When memory is short, the compiler is the first to go."""


def main() -> int:
    """Read the order, compile, report. Returns the exit status."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    order = json.loads(sys.stdin.readline())
    stop = threading.Event()
    threading.Thread(target=_listen, args=(stop,), daemon=True).start()

    def tell(**report: Any) -> None:
        try:
            reports.write(json.dumps(report) + "\n")
        except BrokenPipeError:
            os._exit(1)

    try:
        tell(**_compile(order, Watch(step=lambda step: tell(step=_step(step)), stopped=stop.is_set)))
    except BuildCancelled:
        tell(cancelled=True)
    except EngineError as error:
        tell(error=str(error))
    except Exception as error:  # bindings raise what they like
        tell(error=f"TensorRT: {error}")
    reports.flush()
    # Destructors of a library this large are not worth waiting for.
    os._exit(0)


def _listen(stop: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == CANCEL:
            stop.set()
    os._exit(1)


def _step(step: Step) -> list[Any]:
    return [step.phase, step.done, step.total]


def _compile(order: dict[str, Any], watch: Watch) -> dict[str, Any]:
    options = PlanOptions(**{**order["options"], "capabilities": tuple(order["options"]["capabilities"])})
    trt = load_module()
    if flavour(trt) != order["flavour"] or trt.__version__ != order["version"]:
        raise EngineError(
            f"{flavour(trt)} {trt.__version__} is installed now, {order['flavour']} {order['version']} was asked for"
        )
    if order["gpu"] >= 0:
        from mlmesh_inference.engines.cuda import Device  # noqa: PLC0415  only where there is a GPU

        device = Device(order["gpu"])
        device.enter()
    plan, facts = compile_plan(trt, Path(order["model"]), options, watch)
    with Path(order["plan"]).open("wb") as file:
        file.write(plan)
    return {"facts": facts.to_json()}


if __name__ == "__main__":
    sys.exit(main())
