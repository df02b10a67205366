"""What a supervisor tells whoever started it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlmesh_local.instance import State
from mlmesh_local.report import Report


def failing(failures: int) -> Any:
    application = SimpleNamespace(failures=failures, last_exit="exit code 3")
    return SimpleNamespace(
        name="toolbox-0",
        state=State.BACKING_OFF,
        reason="application: exit code 3",
        application=application,
        sidecar=SimpleNamespace(failures=0, last_exit=""),
        plan=SimpleNamespace(log=Path("toolbox-0.log"), sidecar_log=Path("toolbox-0.sidecar.log")),
    )


def test_each_further_failure_is_told_though_state_and_reason_stay_the_same() -> None:
    reading, writing = os.pipe()
    report = Report(writing)
    for failures in (1, 1, 2, 3, 3):
        report.instance(failing(failures))
    report.close()
    with os.fdopen(reading) as pipe:
        entries = [json.loads(line) for line in pipe]
    assert [entry["failures"] for entry in entries] == [1, 2, 3]
    assert {entry["exit"] for entry in entries} == {"application: exit code 3"}
