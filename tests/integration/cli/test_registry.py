"""The registry's commands against a real registry: search, gates, stages, signatures, deletion, quotas, audit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from mlmesh_cli.app import app
from tests.support.onnx_models import add
from tests.support.registry_process import running


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `mlmesh` against a registry, in a terminal of less than 80 columns."""

    address: str
    folder: Path

    def run(self, *arguments: str, code: int = 0) -> Any:
        """Run a command that must exit with this code."""
        env = {"MLMESH_REGISTRY_TARGET": self.address, "COLUMNS": "79", "MLMESH_STATE_DIR": str(self.folder / "none")}
        result = CliRunner().invoke(app, [*arguments], env=env)
        assert result.exit_code == code, (arguments, result.exit_code, result.stdout, result.stderr, result.exception)
        return result

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.run(*arguments, "-o", "json", code=code).stdout)

    def table(self, *arguments: str, code: int = 0) -> str:
        """What a command prints for people, every line of it within the terminal."""
        text: str = self.run(*arguments, code=code).stdout
        assert max((len(line) for line in text.splitlines()), default=0) <= 80, text
        return text


def _key(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys `ours` and `other`, and the folder `trusted` that has the public half of ours."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "trusted").mkdir()
    _, public = _key(folder, "ours")
    _key(folder, "other")
    (folder / "trusted" / "ours.pem").write_bytes(public.read_bytes())
    return folder


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[Shell]:
    """A registry with three versions of `digits`."""
    folder = tmp_path_factory.mktemp("registry")
    env = {"MLMESH_REGISTRY_TRUSTED_KEYS": str(keys / "trusted"), "MLMESH_REGISTRY_GARBAGE_GRACE_S": "3600"}
    with running(folder / "data", env=env) as (_, address):
        made = Shell(address=address, folder=folder)
        for number, accuracy in enumerate(("0.8", "0.9", "0.95"), 1):
            file = folder / f"{number}.onnx"
            file.write_bytes(add(plus=number))
            made.run(
                "models", "publish", "digits", str(file), "--metric", f"accuracy={accuracy}", "--label", f"run={number}"
            )
        yield made


def test_versions_are_searched_and_ordered(shell: Shell) -> None:
    found = shell.json("models", "versions", "digits", "--filter", "metrics.accuracy >= 0.9 AND labels.run != 3")
    assert [each["name"] for each in found["model_versions"]] == ["models/digits/versions/2"]
    best = shell.json("models", "versions", "--order-by", "metrics.accuracy desc", "--limit", "2")
    assert [each["metrics"]["accuracy"] for each in best["model_versions"]] == [0.95, 0.9]
    assert [each["name"] for each in shell.json("models", "list", "--filter", "id = digits")["models"]] == [
        "models/digits"
    ]
    assert shell.json("models", "list", "--filter", "labels:nothing")["models"] == []
    wrong = shell.run("models", "versions", "digits", "--filter", "metrics.accuracy >> 1", code=1)
    assert "at character 19" in wrong.stderr
    assert "hint:" in wrong.stderr
    assert "digits/3" in shell.table("models", "versions", "digits")
    assert shell.json("models", "get", "digits/2")["digest"] == shell.json("models", "show", "digits/2")["digest"]


def test_an_alias_moves_through_gates_and_leaves_a_history(shell: Shell) -> None:
    gates = shell.folder / "gates.yaml"
    gates.write_text("- {id: accurate, aliases: [stable], metric_bounds: {metric: accuracy, min_value: 0.85}}\n")
    assert "accurate" in shell.table("models", "gates", "set", "digits", str(gates))
    refused = shell.run("models", "promote", "digits", "stable", "1", code=1)
    assert "refused" in refused.stdout
    assert "refused by accurate" in refused.stderr
    dry = shell.json("models", "promote", "digits", "stable", "2", "--dry-run")
    assert (dry["moved"], [result["passed"] for result in dry["gate_results"]]) == (False, [True])
    assert shell.json("models", "alias", "list", "digits")["aliases"] == []
    assert "moved from nothing to 2" in shell.table("models", "promote", "digits", "stable", "2", "--reason", "better")
    assert shell.json("models", "promote", "digits", "stable", "3")["moved"]
    moves = shell.json("models", "history", "digits@stable")["moves"]
    assert [(move["from_version"][-1:], move["to_version"][-1:], move["reason"]) for move in moves] == [
        ("2", "3", ""),
        ("", "2", "better"),
    ]
    assert "better" in shell.table("models", "history", "digits", "--limit", "5")
    # What `show` prints, `set` takes.
    written = shell.folder / "written.json"
    written.write_text(shell.run("models", "gates", "show", "digits", "-o", "json").stdout)
    assert shell.json("models", "gates", "set", "digits", str(written)) == json.loads(written.read_text())
    gates.write_text("gates: [{id: x, nonsense: 1}]")
    assert "nonsense" in shell.run("models", "gates", "set", "digits", str(gates), code=1).stderr


def test_a_stage_keeps_aliases_away(shell: Shell) -> None:
    shown = shell.table("models", "stage", "digits/1", "quarantined", "--reason", "leaked labels")
    assert "quarantined" in shown
    assert "leaked labels" in shown
    assert "quarantined" in shell.table("models", "versions", "digits")
    refused = shell.run("models", "promote", "digits", "next", "1", code=1)
    assert "quarantined" in refused.stderr
    found = shell.json("models", "versions", "digits", "--filter", "stage = QUARANTINED")["model_versions"]
    assert [each["stage_reason"] for each in found] == ["leaked labels"]
    assert shell.json("models", "stage", "digits/1", "active")["stage"] == "VERSION_STAGE_ACTIVE"


def test_a_version_is_signed_verified_and_only_then_downloaded(shell: Shell, keys: Path) -> None:
    ours, other = str(keys / "ours.pem"), str(keys / "other.pem")
    unsigned = shell.run(
        "models", "download", "digits/2", "--to", str(shell.folder / "no"), "--public-key", ours, code=1
    )
    assert "no signature at all" in unsigned.stderr
    assert not (shell.folder / "no").exists()
    untrusted = shell.run("models", "sign", "digits/2", "--private-key", str(keys / "other.key"), code=1)
    assert "no trusted key made it" in untrusted.stderr
    shell.run("models", "download", "digits/2", "--to", str(shell.folder / "files"))
    signed = shell.json(
        "models", "sign", "digits/2", "--private-key", str(keys / "ours.key"), "--folder", str(shell.folder / "files")
    )
    assert signed["valid"]
    shown = shell.table("models", "verify", "digits/2", "--public-key", ours, "--folder", str(shell.folder / "files"))
    assert "every file is what was published" in shown
    assert "valid" in shown
    assert (
        "not signed by the key given" in shell.run("models", "verify", "digits/2", "--public-key", other, code=1).stderr
    )
    shell.run("models", "download", "digits/2", "--to", str(shell.folder / "yes"), "--public-key", ours)
    assert (shell.folder / "yes" / "model.onnx").exists()
    # A file that is another here is told, and not signed.
    (shell.folder / "files" / "model.onnx").write_bytes(b"other")
    arguments = ("--private-key", str(keys / "ours.key"), "--folder", str(shell.folder / "files"))
    assert "not the file" in shell.run("models", "sign", "digits/2", *arguments, code=1).stderr


def test_keys_of_other_kinds_are_named(shell: Shell, keys: Path) -> None:
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(keys / "ed.key")], check=True, capture_output=True
    )
    for file in (keys / "ed.key", keys / "ours.pem"):
        assert "key" in shell.run("models", "sign", "digits/2", "--private-key", str(file), code=1).stderr
    assert (
        "private key"
        in shell.run("models", "verify", "digits/2", "--public-key", str(keys / "ours.key"), code=1).stderr
    )


def test_what_is_deleted_comes_back(shell: Shell) -> None:
    assert "undelete digits/1" in shell.table("models", "delete", "digits/1").replace("\n", " ")
    assert "VERSION_IN_USE" in shell.run("models", "delete", "digits/3", "-o", "json", code=1).stderr
    names = [each["name"][-1] for each in shell.json("models", "versions", "digits")["model_versions"]]
    assert names == ["3", "2"]
    assert len(shell.json("models", "versions", "digits", "--deleted")["model_versions"]) == 3
    shell.run("models", "undelete", "digits/1")
    assert len(shell.json("models", "versions", "digits")["model_versions"]) == 3
    dry = shell.json("models", "gc", "--dry-run", "--grace", "0")
    assert dry["dry_run"]
    assert "would be removed" in shell.table("models", "gc", "--dry-run")
    assert shell.run("models", "delete", "digits@stable", code=2).stderr


def test_limits_hold(shell: Shell) -> None:
    assert "1 of 5" in shell.table("quota", "set", "--models", "5")
    shell.run("quota", "set", "digits", "--bytes", "1GiB", "--versions", "3")
    shown = shell.table("quota", "show", "digits")
    assert "3 of 3" in shown
    assert "1.0 GiB" in shown
    refused = shell.run("models", "publish", "digits", str(shell.folder / "1.onnx"), code=1)
    assert "RESOURCE_EXHAUSTED" in refused.stderr
    assert shell.json("quota", "set", "digits", "--versions", "0")["bytes_max"] == str(2**30)
    assert shell.run("quota", "set", "digits", code=2).stderr
    assert "no size" in shell.run("quota", "set", "--bytes", "lots", code=2).stderr


def test_lineage_is_a_tree(shell: Shell) -> None:
    """Versions that were made from others are made by other clients; what is shown of one without any is told, too."""
    shown = shell.table("models", "lineage", "digits@stable")
    assert "made from" in shown
    assert "nothing known" in shown
    value = shell.json("models", "lineage", "digits/1")
    assert value["children"] == {"models/digits/versions/1": []}
    assert "names a model" in shell.run("models", "lineage", "digits", code=2).stderr


def test_the_audit_log_is_checked_here(shell: Shell) -> None:
    entries = shell.json("audit", "list", "--resource", "models/digits", "--limit", "0")["entries"]
    assert {"CreateModelVersion", "SetModelAlias", "AddModelVersionSignature"} <= {each["method"] for each in entries}
    shell.table("audit", "list", "--limit", "10")
    told = shell.json("audit", "verify")
    assert told["intact"]
    assert shell.json("audit", "verify", "--remembered", told["last"])["intact"]
    number, _, digest = told["last"].partition(":")
    missing = shell.run("audit", "verify", "--remembered", f"{number}:{digest[::-1]}", code=1)
    assert "cut off" in missing.stderr
    assert shell.run("audit", "verify", "--remembered", "nonsense", code=2).stderr
