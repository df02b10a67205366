from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_cli import defaults
from mlmesh_cli.errors import CliError


def test_init_writes_every_yaml_file_and_says_so(tmp_path: Path) -> None:
    written, same = defaults.write_out(tmp_path, force=False)
    assert not same
    names = {str(path.relative_to(tmp_path)) for path in written}
    assert {"manifests/base/kustomization.yaml", "mesh/istio/virtualservice.yaml"} <= names
    root = defaults.builtin_root()
    assert all(path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes() for path in written)


def test_init_again_changes_nothing(tmp_path: Path) -> None:
    first, _ = defaults.write_out(tmp_path, force=False)
    written, same = defaults.write_out(tmp_path, force=False)
    assert not written
    assert sorted(same) == sorted(first)


def test_an_edited_file_is_never_overwritten_unasked(tmp_path: Path) -> None:
    defaults.write_out(tmp_path, force=False)
    edited, removed = tmp_path / "mesh/istio/virtualservice.yaml", tmp_path / "mesh/istio/ingress.yaml"
    edited.write_text("mine")
    removed.unlink()
    with pytest.raises(CliError, match=r"virtualservice\.yaml is there already and differs") as refused:
        defaults.write_out(tmp_path, force=False)
    assert "--force" in refused.value.hint
    assert not removed.exists(), "refused, and yet something was written"
    written, _ = defaults.write_out(tmp_path, force=True)
    assert sorted(written) == sorted([edited, removed])
    assert edited.read_text() != "mine"


def test_up_reads_what_is_named_then_what_is_here_then_the_built_in(tmp_path: Path) -> None:
    chosen = defaults.choose_folders(tmp_path)
    assert chosen.builtin == ("manifests/base", "mesh/istio")
    (tmp_path / "mesh/istio").mkdir(parents=True)
    chosen = defaults.choose_folders(tmp_path)
    assert chosen.builtin == ("manifests/base",)
    assert chosen.istio == (tmp_path / "mesh/istio",)
    chosen = defaults.choose_folders(tmp_path, manifests=[tmp_path])
    assert chosen.manifests == (tmp_path,)
    with pytest.raises(CliError, match="does not exist"):
        defaults.choose_folders(tmp_path, istio=[tmp_path / "nowhere"])


def test_documents_of_a_folder_leave_kustomization_out(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("b")
    (tmp_path / "a.yml").write_text("a")
    (tmp_path / "kustomization.yaml").write_text("k")
    (tmp_path / "note.txt").write_text("n")
    assert [text for _, text in defaults.read_documents([tmp_path])] == ["a", "b"]
    assert defaults.read_documents([Path("-")], lambda: "c") == [(Path("standard input"), "c")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CliError, match=r"no \.yaml file"):
        defaults.read_documents([tmp_path / "empty"])
    with pytest.raises(CliError, match="does not exist"):
        defaults.read_documents([tmp_path / "gone.yaml"])
    (tmp_path / "b.yaml").write_bytes(b"\xff")
    with pytest.raises(CliError, match="is not text"):
        defaults.read_documents([tmp_path / "b.yaml"])
