"""The default YAML: Kubernetes workloads and Istio configuration, from the wheel or from the repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mlmesh_cli.errors import CliError

FOLDERS = ("manifests/base", "mesh/istio")
_SUFFIXES = (".yaml", ".yml")


def builtin_root() -> Path:
    """The folder that holds the default FOLDERS. Raises CliError when the installation lacks them."""
    package = Path(str(files("mlmesh_cli")))
    # The wheel carries copies; an editable install has none and stands in the repository itself.
    for root in (package / "defaults", package.parent.parent):
        if all((root / folder).is_dir() for folder in FOLDERS):
            return root
    raise CliError(
        "this installation lacks the default YAML",
        "install it again: pip install --force-reinstall 'mlmesh[local]'",
        reason="BROKEN_INSTALLATION",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """What a mesh is started from: Kubernetes and Istio YAML, and which of FOLDERS the built-in ones stand in for."""

    manifests: tuple[Path, ...]
    istio: tuple[Path, ...]
    builtin: tuple[str, ...] = ()


def choose_folders(directory: Path, manifests: Sequence[Path] = (), istio: Sequence[Path] = ()) -> Folders:
    """What `mlmesh up` reads: what was named, else the folder in `directory`, else the built-in one.

    Raises:
        CliError: a path that was named does not exist.
    """
    for path in (*manifests, *istio):
        if not path.exists():
            raise CliError(f"{path} does not exist", "name YAML files or folders of them", reason="FILE_NOT_FOUND")
    builtin = []
    chosen: list[tuple[Path, ...]] = []
    for folder, named in zip(FOLDERS, (manifests, istio), strict=True):
        mine = directory / folder
        if named:
            chosen.append(tuple(named))
        elif mine.is_dir():
            chosen.append((mine,))
        else:
            builtin.append(folder)
            chosen.append((builtin_root() / folder,))
    return Folders(manifests=chosen[0], istio=chosen[1], builtin=tuple(builtin))


def yaml_files(folder: Path) -> Iterator[Path]:
    """The YAML files of a folder by name, subfolders not included."""
    yield from (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _SUFFIXES)


def write_out(directory: Path, *, force: bool) -> tuple[list[Path], list[Path]]:
    """Writes the default YAML under `directory`.

    Files that are there and differ stay as they are unless `force`; with any such file nothing is written at all.

    Returns:
        Files written, and files that were there already with the same text.

    Raises:
        CliError: a file is there with another text and `force` was not given.
    """
    root = builtin_root()
    wanted = {
        directory / folder / path.name: path.read_bytes() for folder in FOLDERS for path in yaml_files(root / folder)
    }
    same = [path for path, text in wanted.items() if path.is_file() and path.read_bytes() == text]
    changed = [path for path in wanted if path.exists() and path not in same]
    if changed and not force:
        raise CliError(
            f"{changed[0]} is there already and differs" + (f", and {len(changed) - 1} more" if changed[1:] else ""),
            "keep yours, choose another folder, or overwrite all of them with --force",
            reason="FILE_EXISTS",
        )
    written = [path for path in wanted if path not in same]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wanted[path])
    return written, same


def read_documents(paths: list[Path], standard_input: Callable[[], str] | None = None) -> list[tuple[Path, str]]:
    """The YAML text of files and folders (their YAML files), kustomization files left out; "-" is standard input.

    Raises:
        CliError: a path is missing, a folder has no YAML, or a file is not UTF-8.
    """
    documents: list[tuple[Path, str]] = []
    for path in paths:
        if str(path) == "-" and standard_input is not None:
            documents.append((Path("standard input"), standard_input()))
            continue
        if not path.exists():
            raise CliError(f"{path} does not exist", "name a YAML file or a folder of them", reason="FILE_NOT_FOUND")
        found = [p for p in yaml_files(path) if p.stem != "kustomization"] if path.is_dir() else [path]
        if not found:
            raise CliError(f"{path} has no .yaml file", "name a YAML file or a folder of them", reason="FILE_NOT_FOUND")
        for file in found:
            try:
                documents.append((file, file.read_text(encoding="utf-8")))
            except UnicodeDecodeError as error:
                raise CliError(
                    f"{file} is not text: {error.reason}", "YAML is UTF-8", reason="INVALID_RESOURCE"
                ) from None
    return documents
