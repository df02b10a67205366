"""Options that many commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STATE_DIR = Path(".mlmesh")


class OutputFormat(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


StateDir = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        envvar="MLMESH_STATE_DIR",
        help="Folder that holds the state of the running mesh.",
        show_default=True,
    ),
]
Output = Annotated[
    OutputFormat,
    typer.Option("--output", "-o", help="table for people; json for scripts (one object a line for streams)."),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it as it changes, until Ctrl-C.")]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        "--filename",
        "-f",
        help="YAML file, folder, kustomize folder, or - for standard input; may be repeated.",
        show_default=False,
    ),
]
