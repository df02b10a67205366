"""Error reasons as the code raises them, read from its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mlmesh_runtime import errors

_REASON = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|INTERNAL|DRAINING|UNAUTHENTICATED")
_KINDS = {
    name: kind.default_reason
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.MeshError)
}


def _strings(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may have: a literal, either side of a choice."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _strings(node.body)
        yield from _strings(node.orelse)


def raised(package: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, str]:
    """Reason to a place that raises it, for every MeshError that the wanted modules (relative paths) make."""
    found: dict[str, str] = {}
    for path in sorted(package.rglob("*.py")):
        if not wanted(path.relative_to(package).as_posix()):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            reasons = [text for value in given for text in _strings(value) if _REASON.fullmatch(text)]
            if name in _KINDS and not given:
                reasons = [_KINDS[name]]
            for reason in reasons:
                found.setdefault(reason, f"{path.relative_to(package)}:{node.lineno}")
    return found
