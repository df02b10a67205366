"""Conditions of statuses."""

from __future__ import annotations

from typing import Any

from mlmesh_local.resources.gateway_api.attach import Fault

Status = dict[str, Any]


def condition(kind: str, reason: str, message: str, *, value: bool = True) -> Status:
    """A condition of the Gateway API."""
    return {"type": kind, "status": "True" if value else "False", "reason": reason, "message": message}


def judged(kind: str, fault: Fault | None, reason: str, message: str) -> Status:
    """A condition that holds, or why it does not."""
    return condition(kind, fault.reason, fault.message, value=False) if fault else condition(kind, reason, message)
