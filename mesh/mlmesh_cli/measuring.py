"""What `mlmesh metrics` and `mlmesh traces` ask for: conditions, and a scrape."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterable

from mlmesh_cli.errors import usage_error

SCRAPE_S = 30.0


def conditions(texts: Iterable[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping. Raises a usage error."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise usage_error(f"{option} {text!r} is not NAME=VALUE", f"write {option} {text or 'name'}=value")
        found[name] = value
    return found


async def scrape(address: str) -> str:
    """The text that Prometheus gets at "host:port"."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=SCRAPE_S) as answer:
            return bytes(answer.read()).decode()

    return await asyncio.to_thread(read)
