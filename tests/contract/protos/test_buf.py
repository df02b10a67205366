"""buf: our protos are clean, and the gate that says so does refuse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REGISTRY = Path("protos/mlmesh/registry/v1/registry.proto")


def _protos(repository: Path, *arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "tools/protos.py", *map(str, arguments)],
        check=False,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(repository: Path, tmp_path: Path) -> Path:
    """A git repository with our protos, committed and tagged as a release, to be changed by a test."""
    sources = [p for p in (repository / "protos").rglob("*.proto") if "buf" not in p.relative_to(repository).parts]
    for source in sources:
        target = tmp_path / source.relative_to(repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "contract"], check=True)
    subprocess.run([*git, "-c", "tag.gpgsign=false", "tag", "v0.1.0"], check=True)
    return tmp_path


def _change(tree: Path, pattern: str, replacement: str) -> None:
    path = tree / REGISTRY
    text = path.read_text()
    changed, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
    assert count == 1, pattern
    path.write_text(changed)


def test_lint_is_clean(repository: Path) -> None:
    code, output = _protos(repository, "lint")
    assert code == 0, output
    assert output == ""


@pytest.mark.parametrize(
    ("pattern", "replacement", "finding"),
    [
        (r"^  // Size in bytes\.\n", "", "non-empty comment"),
        (r"string etag = 6;", "string eTag = 6;", "lower_snake_case"),
        (r"^  rpc GetModel\(GetModelRequest\)", "  rpc GetModel(ListModelsRequest)", "GetModelRequest"),
    ],
    ids=["comment", "field name", "request type"],
)
def test_lint_refuses(repository: Path, tree: Path, pattern: str, replacement: str, finding: str) -> None:
    _change(tree, pattern, replacement)
    code, output = _protos(repository, "lint", "--repository", tree)
    assert code != 0
    assert finding in output


def test_an_addition_breaks_nothing(repository: Path, tree: Path) -> None:
    _change(tree, r"^  string etag = 6;", "  string etag = 6;\n  // Somebody.\n  string owner = 99;")
    code, output = _protos(repository, "breaking", "--repository", tree)
    assert code == 0, output


@pytest.mark.parametrize(
    ("pattern", "replacement", "finding"),
    [
        (r"^  string etag = 6;", "  int64 etag = 6;", "etag"),
        (r"^  int64 latest_version = 7;\n", "", "latest_version"),
        (r"^  rpc GetBlob\(GetBlobRequest\) returns \(GetBlobResponse\);\n", "", "GetBlob"),
    ],
    ids=["type", "field", "method"],
)
def test_a_breaking_change_is_refused(
    repository: Path, tree: Path, pattern: str, replacement: str, finding: str
) -> None:
    _change(tree, pattern, replacement)
    code, output = _protos(repository, "breaking", "--repository", tree)
    assert code != 0
    assert finding in output


def test_protos_that_do_not_compile_are_said_to(repository: Path, tree: Path) -> None:
    _change(tree, r"string etag = 6;", "strin etag = 6;")
    code, output = _protos(repository, "lint", "--repository", tree)
    assert code == 1
    assert "do not compile" in output


def test_nothing_is_promised_before_the_first_release(repository: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    code, output = _protos(repository, "breaking", "--repository", tmp_path)
    assert code == 0
    assert "no release tag yet" in output
