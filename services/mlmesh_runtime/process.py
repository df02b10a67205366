"""A process's entry: settings, logs and telemetry around one async main."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping

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
        asyncio.run(_awaited(main, settings))
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


async def _awaited(main: Callable[[Settings], Awaitable[None]], settings: Settings) -> None:
    await main(settings)


def _bad_configuration(service: str, error: ConfigError) -> int:
    sys.stderr.write(f"{service}: bad configuration: {error}\n")
    return EXIT_CONFIG
