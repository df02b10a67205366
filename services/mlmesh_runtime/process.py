"""A process's entry: settings, logs and telemetry around one async main."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar

from mlmesh_runtime import logs
from mlmesh_runtime.config import ConfigError, Settings
from mlmesh_runtime.telemetry import Telemetry

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_CONFIG = 2


def run(main: Callable[[Settings], Awaitable[None]], *, service: str) -> None:
    """Run a service's main to its end and exit.

    Exit codes: 0 ended well, 1 failed (the log says why), 2 the configuration is wrong (one clear line on stderr).
    """
    sys.exit(_run(main, service, os.environ))


def _run(main: Callable[[Settings], Awaitable[None]], service: str, environ: Mapping[str, str]) -> int:
    try:
        settings = Settings.from_environment(environ, service=service)
    except ConfigError as error:
        return _bad_configuration(service, error)
    logs.configure(settings)
    telemetry = Telemetry.start(settings)
    try:
        asyncio.run(_until_signal(main, settings))
    except ConfigError as error:
        return _bad_configuration(service, error)
    except KeyboardInterrupt:
        return 128 + 2
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        logger.critical("the process failed", exc_info=error)
        return EXIT_FAILED
    finally:
        telemetry.shutdown()
    return 0


async def _until_signal(main: Callable[[Settings], Awaitable[None]], settings: Settings) -> None:
    task = asyncio.current_task()
    with Signals(lambda: task and task.cancel()) as signals:
        try:
            await main(settings)
        except asyncio.CancelledError:
            if not signals.asked.is_set():
                raise


class Signals:
    """SIGTERM and SIGINT of this process, from its first moment to its last.

    The first one asks to stop: whoever waits for `asked`, or else, while the process starts, `interrupt` is called. The
    second one asks to hurry.
    """

    current: ClassVar[Signals | None] = None

    def __init__(self, interrupt: Callable[[], object]) -> None:
        self.asked, self.hurry = asyncio.Event(), asyncio.Event()
        self.awaited = False
        self._interrupt = interrupt
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._came, number.name)
        Signals.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Signals.current = None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    def _came(self, name: str) -> None:
        logger.info("stopping", extra={"signal": name})
        if self.asked.is_set():
            self.hurry.set()
            return
        self.asked.set()
        if not self.awaited:
            self._interrupt()


def _bad_configuration(service: str, error: ConfigError) -> int:
    sys.stderr.write(f"{service}: bad configuration: {error}\n")
    return EXIT_CONFIG
