"""Progress of a start: to whoever started the supervisor (JSON lines on a pipe), else to a person's terminal."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from mlmesh_local.instance import Instance


class Report:
    """Tells how the start goes. A reader that went away is forgotten."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        if descriptor >= 0:
            # A reader that stopped reading must not stop the mesh.
            os.set_blocking(descriptor, False)
        self._told: dict[str, tuple[str, str, int]] = {}

    def step(self, message: str) -> None:
        """Something was done."""
        self._write({"event": "step", "message": message}, message)

    def instance(self, instance: Instance) -> None:
        """Where an instance stands, when that changed or it failed once more."""
        failures = max(instance.application.failures, instance.sidecar.failures)
        # Who looks now and then may never see it run between two failures: their number must count as a change.
        now = (instance.state.value, instance.reason, failures)
        if self._told.get(instance.name) == now:
            return
        self._told[instance.name] = now
        application = instance.application.failures > 0
        failed_log = instance.plan.log if application else instance.plan.sidecar_log
        slot = instance.application if application else instance.sidecar
        self._write(
            {
                "event": "instance",
                "instance": instance.name,
                "state": instance.state.value,
                "reason": instance.reason,
                "failures": failures,
                "exit": f"{'application' if application else 'sidecar'}: {slot.last_exit}",
                "log": str(failed_log),
            },
            f"{instance.name}: {instance.state.value}{f' ({instance.reason})' if instance.reason else ''}",
        )

    def ready(self, gateway: str) -> None:
        """All is ready; the last message."""
        self._write({"event": "ready", "gateway": gateway}, f"ready{f', gateway on {gateway}' if gateway else ''}")
        self.close()

    def failed(self, message: str, reason: str) -> None:
        """The start failed; the last message."""
        self._write({"event": "failed", "message": message, "reason": reason}, f"error: {message}")
        self.close()

    def close(self) -> None:
        """No more messages."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -2

    def _write(self, entry: dict[str, Any], text: str) -> None:
        if self._descriptor == -2:
            return
        if self._descriptor == -1:
            sys.stderr.write(f"{text}\n")
            return
        try:
            os.write(self._descriptor, (json.dumps(entry) + "\n").encode())
        except BlockingIOError:
            pass
        except OSError:
            self.close()
