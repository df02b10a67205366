"""Rules of the house that no linter knows: who reads the environment, who starts tasks, how large a module may be."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = sorted(
    path
    for folder in ("services", "mesh")
    for path in (ROOT / folder).rglob("*.py")
    if not path.stem.endswith(("_pb2", "_pb2_grpc"))
)

# Where the process's own environment may be touched: entries, which hand it on as a mapping.
ENVIRONMENT = {
    "services/mlmesh_runtime/process.py",
    "mesh/mlmesh_local/__main__.py",
    "mesh/mlmesh_cli/app.py",
    "mesh/mlmesh_cli/connection.py",
    # Children of inference get the environment with the path of modules; oneDNN reads a bound of its own there.
    "services/mlmesh_inference/compiling.py",
    "services/mlmesh_inference/engines/child.py",
    "services/mlmesh_inference/engines/openvino.py",
    # Processes of a training: torch elastic tells each by variables who it is, and reads others instead of arguments.
    "services/mlmesh_training/trainer/__main__.py",
    "services/mlmesh_training/trainer/fitting/agent.py",
    "services/mlmesh_training/trainer/fitting/ranks.py",
    "services/mlmesh_training/trainer/fitting/start.py",
    "services/mlmesh_training/trainer/fitting/worker.py",
}
# About 400 is the aim; this is where a module must be split.
LINES_MAX = 600
# About 70 is the aim.
FUNCTION_LINES_MAX = 90


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _at(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def test_there_are_modules() -> None:
    assert len(MODULES) > 80


def test_only_entries_touch_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in MODULES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv", "environb", "putenv")
        and ast.unparse(node.value) == "os"
    }
    assert readers <= ENVIRONMENT


def test_tasks_belong_to_a_group() -> None:
    """A task that nobody keeps is collected in the middle of its work, and its error with it."""
    bare = []
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Attribute) and node.attr == "create_task":
                if re.search(r"^asyncio$|loop(\(\))?$", ast.unparse(node.value)):
                    bare.append(_at(path, node))
            elif (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and ast.unparse(node.value.func) == "asyncio.ensure_future"
            ):
                bare.append(_at(path, node))
    assert bare == []


def test_modules_and_functions_can_be_read() -> None:
    large = []
    for path in MODULES:
        text = path.read_text()
        if len(text.splitlines()) > LINES_MAX:
            large.append(f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines")
        if "migrations" in path.parts:  # a migration is one list of statements
            continue
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # The options of a command are a table, one row each; what it does with them must fit a screen.
                first = node.body[0].lineno if "commands" in path.parts else node.lineno
                lines = (node.end_lineno or node.lineno) - first + 1
                if lines > FUNCTION_LINES_MAX:
                    large.append(f"{_at(path, node)} {node.name} has {lines} lines")
    assert large == []


def test_modules_say_what_they_are() -> None:
    silent = [str(p.relative_to(ROOT)) for p in MODULES if p.read_text().strip() and not ast.get_docstring(_tree(p))]
    assert silent == []


def test_the_commands_that_a_person_remembers() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*## ", text, re.MULTILINE))
    assert targets == {"help", "install", "front", "gen", "check", "test", "tools", "bench", "demo", "up"}
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets


def test_make_alone_helps() -> None:
    done = subprocess.run(["make"], check=False, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    for target in ("install", "test", "demo"):
        assert f"make {target}" in done.stdout


@pytest.mark.parametrize("script", [".ci/run", "tools/build.sh"])
def test_scripts_run_and_stop_at_errors(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_tools_say_what_is_missing_without_go(tmp_path: Path) -> None:
    for program in ("bash", "dirname", "awk", "mkdir"):
        for folder in ("/usr/bin", "/bin"):
            if (Path(folder) / program).exists() and not (tmp_path / program).exists():
                (tmp_path / program).symlink_to(Path(folder) / program)
    done = subprocess.run(
        [str(tmp_path / "bash"), "tools/build.sh"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
        timeout=20,
    )
    assert done.returncode == 1
    assert "Go is not installed" in done.stderr
