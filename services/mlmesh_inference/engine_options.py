"""What an engine may use, worked out from the process's settings and a version's configuration.

One function, because an engine that was compiled beforehand is found again only under the very options that it was
compiled for.
"""

from __future__ import annotations

from typing import Final

from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.configured import rows_bounds
from mlmesh_inference.engines.base import EngineOptions
from mlmesh_inference.serving import ServingConfig

PREFIX: Final = "mlmesh."
"""Parameters of a configuration that are ours begin so."""


def engine_options(config: ServingConfig, settings: InferenceSettings) -> EngineOptions:
    """Options for a version. Raises configured.ConfigError."""
    rows_max, rows_preferred = rows_bounds(config, rows_max=settings.rows_max, rows_preferred=settings.rows_preferred)
    return EngineOptions(
        threads=settings.threads,
        concurrency=config.instances or settings.concurrency,
        rows_max=rows_max,
        rows_preferred=rows_preferred,
        parameters={
            name.removeprefix(PREFIX): value for name, value in config.parameters.items() if name.startswith(PREFIX)
        },
    )
