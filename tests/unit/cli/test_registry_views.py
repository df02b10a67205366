"""What the registry's commands show, and what they conclude, from messages made here."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError
from mlmesh_cli.names import parse_size
from mlmesh_cli.promoting import read_gates
from mlmesh_cli.render import registry as view
from mlmesh_registry.audit import NO_DIGEST, AuditEntry, chained
from tests.support.cli import NOW, at
from tests.unit.cli.conftest import FakeMesh, abort, text_of


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1000", 1000), ("7B", 7), ("1.5KiB", 1536), ("2 MiB", 2 << 20), ("2TiB", 2 << 40)]
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1KB", "1 2", "1e3", "٣"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(CliError):
        parse_size(text)


def test_tables_fit_a_terminal_of_80_columns() -> None:
    spiffe = "spiffe://cluster.local/ns/mlmesh/sa/toolbox"
    move = pb.AliasMove(
        alias="models/a-rather-long-name/aliases/stable",
        from_version="models/a-rather-long-name/versions/12",
        to_version="models/a-rather-long-name/versions/13",
        time=at(-60),
        actor=spiffe,
        reason="it is better on everything that we have looked at, and smaller, and faster",
    )
    removed = pb.AliasMove(alias="models/m/aliases/a", from_version="models/m/versions/1", time=at(0))
    result = pb.GateResult(
        gate="accurate-enough", message="accuracy is 0.8, at least 0.9 is wanted by this gate, really"
    )
    signature = pb.VersionSignature(
        problem="no trusted key made it: the key that it names is not among them", creator=spiffe
    )
    entry = pb.AuditEntry(
        sequence=123456,
        time=at(0),
        actor=spiffe,
        method="AddModelVersionSignature",
        resource="models/a-rather-long-name/versions/12",
        digest="ab" * 32,
    )
    quota = pb.Quota(
        name="models/-", bytes_max=1 << 41, bytes_used=1 << 40, versions_max=10**6, models_used=3, etag="r123"
    )
    gate = pb.Gate(id="accurate-enough", aliases=["stable", "canary"])
    gate.metric_bounds.metric, gate.metric_bounds.min_value = "accuracy", 0.9
    held = pb.Gate(id="held")
    held.held_alias.alias = "canary"
    held.held_alias.min_age.FromTimedelta(timedelta(hours=1))
    garbage = pb.CollectGarbageResponse(dry_run=True, blob_count=2000, blobs=[f"blobs/sha256-{'0' * 64}"] * 3)
    for shown in (
        view.moves_table([move, removed], NOW),
        view.gate_results_table([result, pb.GateResult(gate="x", passed=True)]),
        view.signatures_table([signature, pb.VersionSignature(valid=True, key_id="cd" * 32)], NOW),
        view.audit_table([entry]),
        view.quota_table([quota, pb.Quota(name="models/m")]),
        view.gates_table([gate, held]),
        view.garbage_view(garbage),
    ):
        text = text_of(shown, width=80)
        assert max(len(line) for line in text.splitlines()) <= 80, text
    assert "min_value=0.9" in text_of(view.gates_table([gate]))
    assert "min_age=3600s" in text_of(view.gates_table([held]))
    assert "removed" in text_of(view.moves_table([removed], NOW))
    assert "1.0 TiB" not in text_of(view.quota_table([quota])), "sizes go to GiB"
    assert "and 1997 more" in text_of(view.garbage_view(garbage))
    for empty in (view.moves_table([], NOW), view.gate_results_table([]), view.audit_table([]), view.gates_table([])):
        assert text_of(empty).strip()


def _version(name: str, *parents: str) -> pb.ModelVersion:
    return pb.ModelVersion(
        name=f"models/{name}", lineage=pb.Lineage(parents=[f"models/{parent}" for parent in parents])
    )


def test_lineage_is_walked_both_ways_and_ends(mesh: FakeMesh) -> None:
    """Grandparents, grandchildren, a parent that is gone, and a circle that nobody can have published."""
    versions = {
        version.name: version
        for version in (
            _version("m/versions/1"),
            _version("m/versions/2", "m/versions/1", "gone/versions/9"),
            _version("m/versions/3", "m/versions/2"),
            _version("n/versions/1", "m/versions/3"),
            _version("n/versions/2", "n/versions/1"),
            _version("loop/versions/1", "loop/versions/1"),
        )
    }

    def get(request: pb.GetModelVersionRequest, context: Any) -> pb.GetModelVersionResponse:
        if request.name not in versions:
            abort(context, grpc.StatusCode.NOT_FOUND, "not found", reason="MODEL_NOT_FOUND")
        return pb.GetModelVersionResponse(model_version=versions[request.name])

    def children(request: pb.ListModelVersionsRequest, _context: Any) -> pb.ListModelVersionsResponse:
        wanted = request.filter.removeprefix('lineage.parents:"').removesuffix('"')
        assert request.parent == "models/-"
        return pb.ListModelVersionsResponse(
            model_versions=[each for each in versions.values() if wanted in each.lineage.parents]
        )

    mesh.registry["GetModelVersion"], mesh.registry["ListModelVersions"] = get, children
    result = mesh.run("models", "lineage", "m/3")
    assert result.exit_code == 0, result.stderr
    for name in ("m/2", "m/1", "gone/9", "n/1", "n/2"):
        assert name in result.stdout
    value = json.loads(mesh.run("models", "lineage", "m/3", "--depth", "1", "-o", "json").stdout)
    assert value["parents"] == {"models/m/versions/3": ["models/m/versions/2"]}
    assert value["children"] == {"models/m/versions/3": ["models/n/versions/1"]}
    assert "(again)" in mesh.run("models", "lineage", "loop/1").stdout


def _log(count: int) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for sequence in range(1, count + 1):
        before = entries[-1].digest if entries else NO_DIGEST
        entries.append(
            chained(
                sequence=sequence,
                time=NOW,
                actor="spiffe://a",
                method="SetModelAlias",
                resource="models/m",
                detail={"n": sequence},
                previous_digest=before,
            )
        )
    return entries


def _serve_log(mesh: FakeMesh, entries: list[AuditEntry]) -> None:
    """Pages of two."""

    def answer(request: pb.ListAuditEntriesRequest, _context: Any) -> pb.ListAuditEntriesResponse:
        start = int(request.page_token or 0)
        page = [
            pb.AuditEntry(
                sequence=entry.sequence,
                time=at(0),
                actor=entry.actor,
                method=entry.method,
                resource=entry.resource,
                detail=entry.detail,
                previous_digest=entry.previous_digest,
                digest=entry.digest,
            )
            for entry in entries[start : start + 2]
        ]
        more = str(start + 2) if start + 2 < len(entries) else ""
        return pb.ListAuditEntriesResponse(entries=page, next_page_token=more)

    mesh.registry["ListAuditEntries"] = answer


def test_an_audit_log_that_is_whole(mesh: FakeMesh) -> None:
    entries = _log(5)
    _serve_log(mesh, entries)
    result = mesh.run("audit", "verify")
    assert result.exit_code == 0, result.stderr
    assert f"5:{entries[-1].digest}" in result.stdout.replace("\n", "")
    noted = f"3:{entries[2].digest}"
    assert mesh.run("audit", "verify", "--remembered", noted).exit_code == 0
    _serve_log(mesh, [])
    assert json.loads(mesh.run("audit", "verify", "-o", "json").stdout) == {"entries": 0, "last": "", "intact": True}
    assert mesh.run("audit", "verify", "--remembered", noted).exit_code == 1


@pytest.mark.parametrize("how", ["changed", "removed", "swapped", "first cut off", "resigned"])
def test_an_audit_log_that_was_tampered_with(mesh: FakeMesh, how: str) -> None:
    from dataclasses import replace

    from mlmesh_registry.audit import digest_of

    entries = _log(5)
    match how:
        case "changed":
            entries[2] = replace(entries[2], actor="spiffe://b")
        case "removed":
            del entries[2]
        case "swapped":
            entries[1], entries[2] = entries[2], entries[1]
        case "first cut off":
            del entries[0]
        case "resigned":
            other = replace(entries[2], actor="spiffe://b")
            entries[2] = replace(other, digest=digest_of(other))
    _serve_log(mesh, entries)
    result = mesh.run("audit", "verify", "-o", "json")
    assert result.exit_code == 1
    assert json.loads(result.stderr)["error"]["reason"] == "AUDIT_LOG_BROKEN"


def test_a_log_that_was_written_anew_is_not_the_noted_one(mesh: FakeMesh) -> None:
    """A whole chain proves nothing about who wrote it: that is what an entry that was noted is for."""
    old = _log(4)
    _serve_log(mesh, _log(3))
    result = mesh.run("audit", "verify", "--remembered", f"4:{old[-1].digest}")
    assert result.exit_code == 1
    assert "cut off" in result.stderr


@pytest.mark.parametrize(
    ("text", "gates"),
    [
        ("[]", 0),
        ("", 0),
        ("- {id: a, signed: {}}\n- {id: b, digest_verified: {max_age: 3600s}}", 2),
        ('{"gates": [{"id": "a", "metric_bounds": {"metric": "x", "min_value": 0.5}}]}', 1),
    ],
)
def test_gates_from_a_file(tmp_path: Path, text: str, gates: int) -> None:
    (tmp_path / "g.yaml").write_text(text)
    assert len(read_gates(tmp_path / "g.yaml").gates) == gates


@pytest.mark.parametrize("text", ["7", "[{id: a, colour: red}]", "{gates: {}}", "[", "[{id: a, signed: 3}]", "\x00"])
def test_files_that_hold_no_gates(tmp_path: Path, text: str) -> None:
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(CliError) as refused:
        read_gates(tmp_path / "g.yaml")
    assert "g.yaml" in refused.value.problem


def test_a_promotion_that_is_refused_after_it_was_allowed(mesh: FakeMesh) -> None:
    """A gate changes its mind between the question and the move."""
    answers = [True]

    def move(request: pb.SetModelAliasRequest, context: Any) -> pb.SetModelAliasResponse:
        if not request.validate_only:
            answers.append(False)
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, "no more", reason="GATE_REFUSED")
        result = pb.GateResult(gate="fresh", passed=answers[-1], message="it was")
        return pb.SetModelAliasResponse(gate_results=[result])

    mesh.registry["SetModelAlias"] = move
    mesh.registry["ListModelAliases"] = lambda _request, _context: pb.ListModelAliasesResponse()
    result = mesh.run("models", "promote", "m", "stable", "2")
    assert result.exit_code == 1
    assert "refused by fresh" in result.stderr
    assert "stays at nothing" in result.stdout
