"""Being asked to pause: a signal to the training process, seen at the next optimizer step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol

from mlmesh_training.backends.process import PAUSE_SIGNAL


class PauseRequested(Exception):  # noqa: N818 - not an error
    """A checkpoint was written because somebody asked to pause."""


class Flag(Protocol):
    """Set once, by a signal or by another process; a `multiprocessing.RawValue` is one."""

    value: bool


class Asked:
    """A flag of this process."""

    value = False


ASKED: Flag = Asked()
"""Of this process: set once it was asked to pause."""


def listen() -> None:
    """Take the signal from now on. Only the main thread may call this."""
    signal.signal(PAUSE_SIGNAL, _heard)


def forward(flag: Flag) -> None:
    """Set this flag too, now or once asked."""
    _also.append(flag)
    flag.value = flag.value or ASKED.value


_also: list[Flag] = []


def _heard(_number: int, _frame: FrameType | None) -> None:
    ASKED.value = True
    for flag in _also:
        flag.value = True
