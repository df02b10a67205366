"""Lint our protos and find breaking changes with buf, without a network: `python tools/protos.py lint|breaking`.

buf reads the protos compiled, since their imports (protovalidate, well-known types) come from Python wheels. What is
compared for breaking changes is the tree and the latest release tag (``v*``), or, before the first release, nothing:
until then the contract may change. ``--against REF`` names any other commit.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
OURS = ("mlmesh", "open_inference")


class CompileError(Exception):
    """The protos of a tree do not compile; protoc has said why on stderr."""


def compile_image(protos: Path, out: Path) -> None:
    """Compile `protos` with source info and imports into the descriptor set `out`. Raises CompileError."""
    imports = descriptor_pb2.FileDescriptorSet()
    imports.ParseFromString((ROOT / "protos" / "mlmesh" / "descriptor_set.binpb").read_bytes())
    kept = [file for file in imports.file if not file.name.startswith(tuple(f"{name}/" for name in OURS))]
    sources = sorted(str(p.relative_to(protos)) for name in OURS for p in (protos / name).rglob("*.proto"))
    with tempfile.NamedTemporaryFile(suffix=".binpb") as known:
        known.write(descriptor_pb2.FileDescriptorSet(file=kept).SerializeToString())
        known.flush()
        arguments = [
            "protoc",
            f"-I{protos}",
            f"--descriptor_set_in={known.name}",
            f"--descriptor_set_out={out}",
            "--include_imports",
            "--include_source_info",
            *sources,
        ]
        if protoc.main(arguments):
            raise CompileError(f"the protos under {protos} do not compile")


def image_of_commit(repository: Path, ref: str, out: Path) -> None:
    """Compile the protos of a commit of `repository`. Raises CompileError, and CalledProcessError when it has none."""
    archive = subprocess.run(
        ["git", "-C", str(repository), "archive", "--format=tar", ref, "protos"], check=True, capture_output=True
    ).stdout
    with tempfile.TemporaryDirectory() as tmp:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(tmp, filter="data")
        compile_image(Path(tmp) / "protos", out)


def latest_release(repository: Path) -> str | None:
    """The newest tag v* that HEAD contains, None when there is none or no git history."""
    found = subprocess.run(
        ["git", "-C", str(repository), "describe", "--tags", "--abbrev=0", "--match", "v*"],
        check=False,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or None if found.returncode == 0 else None


def buf(*arguments: str) -> int:
    """Run buf with our rules; its exit code. Findings go to stdout."""
    program = Path(sys.executable).parent / "buf"
    found = str(program) if program.exists() else shutil.which("buf")
    if not found:
        sys.stderr.write("protos: buf is missing: make install\n")
        return 127
    return subprocess.run([found, *arguments, "--config", str(ROOT / "buf.yaml")], check=False).returncode


def lint(repository: Path) -> int:
    with tempfile.TemporaryDirectory() as tmp:
        image = Path(tmp) / "image.binpb"
        compile_image(repository / "protos", image)
        return buf("lint", str(image))


def breaking(repository: Path, against: str | None) -> int:
    ref = against or latest_release(repository)
    if ref is None:
        sys.stdout.write("protos: no release tag yet, so nothing is promised and nothing can break\n")
        return 0
    with tempfile.TemporaryDirectory() as tmp:
        new, old = Path(tmp) / "new.binpb", Path(tmp) / "old.binpb"
        compile_image(repository / "protos", new)
        image_of_commit(repository, ref, old)
        return buf("breaking", str(new), "--against", str(old))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["lint", "breaking"])
    parser.add_argument("--repository", type=Path, default=ROOT, help="tree to look at (default: this one)")
    parser.add_argument("--against", help="commit to compare with (default: the latest release tag)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "lint":
            return lint(options.repository)
        return breaking(options.repository, options.against)
    except CompileError as error:
        sys.stderr.write(f"protos: {error}\n")
        return 1
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"protos: {error.stderr.decode(errors='replace').strip()}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
