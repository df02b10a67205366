"""Where a model came from: digests of the code and of the environment that trained it."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def code_digest() -> str:
    """SHA-256 over names and bytes of the modules of this package that decide what a model becomes, hex."""
    digest = hashlib.sha256()
    modules = [_PACKAGE / "evaluate.py", _PACKAGE / "export.py", _PACKAGE / "recipes.py"]
    for path in sorted([*modules, *(_PACKAGE / "trainer").glob("*.py")]):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE)}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def environment_digest() -> str:
    """SHA-256 over Python's version and the installed distributions with their versions, hex."""
    lines = {f"{found.name.lower()}=={found.version}" for found in metadata.distributions() if found.name}
    lines.add(f"python=={platform.python_version()} {platform.machine()} {platform.system()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
