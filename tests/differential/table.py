"""The table of cases: small YAML texts in cases/*.yaml, each given to both sides.

A file holds several cases. Comments before the first document of a case say what it is:

    # case: retries-of-a-rule
    # proxies: client gateway        which proxies are compared; "client server-v1" when not said
    # world: wide                    a file of worlds/, which stands in front; "small" when not said, "none" for none
    # alone: because of ...          a control plane of its own: Istio keeps something of the case before
    # accepted: differences-id       whatever differs is that difference
    # refused: differences-id        our side refuses it, on purpose
    # secrets: mlmesh/cert           Secrets with certificates for Istio; our side reads none and issues its own
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.mesh_world import WORKLOADS

FOLDER = Path(__file__).resolve().parent
_HEADER = re.compile(r"^# (case|proxies|world|accepted|refused|alone|secrets): (.+)$", re.MULTILINE)
_START = re.compile(r"^(?=# case: )", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One text for both sides. ``own`` is without the world in front of it."""

    name: str
    file: str
    own: str
    world: str
    proxies: tuple[str, ...]
    accepted: str = ""
    refused: str = ""
    alone: bool = False
    secrets: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """File and name."""
        return f"{self.file}:{self.name}"


@functools.cache
def world(name: str) -> str:
    """The documents of a world."""
    if name == "none":
        return ""
    return WORKLOADS if name == "small" else (FOLDER / "worlds" / f"{name}.yaml").read_text()


def cases() -> Iterator[Case]:
    """Every case, in the order of files."""
    for path in sorted((FOLDER / "cases").glob("*.yaml")):
        for text in _START.split(path.read_text())[1:]:
            said = dict(_HEADER.findall(text.split("\n---", 1)[0].split("\napiVersion", 1)[0]))
            yield Case(
                name=said["case"],
                file=path.stem,
                own=text,
                world=said.get("world", "small"),
                proxies=tuple(said.get("proxies", "client server-v1").split()),
                accepted=said.get("accepted", ""),
                refused=said.get("refused", ""),
                alone="alone" in said,
                secrets=tuple(said.get("secrets", "").split()),
            )
