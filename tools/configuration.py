"""Writes docs/configuration.md from the variables that the packages declare: `python tools/configuration.py`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
MODULES = {
    "mlmesh_runtime.config": "Every service",
    "mlmesh_registry.config": "The registry",
    "mlmesh_training.config": "Training",
    "mlmesh_training.backends.kubernetes.config": "Training on a cluster",
    "mlmesh_training.worker.config": "Workers on a cluster (set by the training service)",
    "mlmesh_inference.config": "Inference",
    "mlmesh_cli.config": "`mlmesh`",
}
HEAD = """# Configuration

Services read the environment and nothing else; each package's `config` module is the one place. A wrong value ends the
process at once with exit code 2 and one line that names the variable.

<!-- Written by tools/configuration.py; a test compares. -->
"""


def page() -> str:
    """The page as it should be."""
    return HEAD + "".join(_section(title, importlib.import_module(name).VARIABLES) for name, title in MODULES.items())


def _section(title: str, variables: Any) -> str:
    return "\n".join(
        ["", f"## {title}", "", "| Variable | Default | Meaning |", "|---|---|---|", *_rows(variables), ""]
    )


def _rows(variables: Any) -> Iterator[str]:
    for variable in variables:
        default = f"`{variable.default}`" if variable.default else ""
        yield f"| `{variable.name}` | {default} | {variable.meaning.replace('|', '/')} |"


if __name__ == "__main__":
    PAGE.write_text(page())
