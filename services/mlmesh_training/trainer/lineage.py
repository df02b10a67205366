"""Where a model came from: digests of the code and of the environment that trained it."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_MODULES = ("datasets.py", "evaluate.py", "export.py", "latency.py", "recipes.py")


def code_digest(definition: str = "") -> str:
    """SHA-256 over names and bytes of the modules that decide what a model becomes, hex.

    Those of this package, and where a recipe's `definition`, a loaded module, is of another distribution, all modules
    of the top-level package that it is in.
    """
    digest = hashlib.sha256()
    ours = [*(_PACKAGE / name for name in _MODULES), *(_PACKAGE / "trainer").rglob("*.py")]
    _add(digest, _PACKAGE, ours)
    top = definition.partition(".")[0]
    if top and top != __name__.partition(".")[0]:
        file = getattr(sys.modules.get(top), "__file__", None)
        if file and Path(file).name == "__init__.py":
            _add(digest, Path(file).parent.parent, list(Path(file).parent.rglob("*.py")))
        elif file:
            _add(digest, Path(file).parent, [Path(file)])
    return digest.hexdigest()


def environment_digest() -> str:
    """SHA-256 over Python's version and the installed distributions with their versions, hex."""
    lines = {f"{found.name.lower()}=={found.version}" for found in metadata.distributions() if found.name}
    lines.add(f"python=={platform.python_version()} {platform.machine()} {platform.system()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _add(digest: hashlib._Hash, root: Path, paths: list[Path]) -> None:
    for path in sorted(paths):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(data)}\0".encode())
        digest.update(data)
