from __future__ import annotations

import base64
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from mlmesh_local.bundles import spiffe_bundle
from mlmesh_local.pki import Authority, Certificate
from mlmesh_runtime.errors import Corrupt, InvalidInput, WrongState

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def authority(folder: Path, now: datetime = NOW) -> Authority:
    return Authority(folder / "ca", clock=lambda: now)


def leaf(certificate: Certificate) -> x509.Certificate:
    return x509.load_pem_x509_certificate(certificate.chain_pem.encode())


def roots(bundle: str) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(bundle.encode())


def test_a_leaf_carries_one_critical_spiffe_uri_and_nothing_else(tmp_path: Path) -> None:
    certificate = authority(tmp_path).issue("registry", "mlmesh")
    names = leaf(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier("spiffe://cluster.local/ns/mlmesh/sa/registry")]
    assert certificate.identity == "spiffe://cluster.local/ns/mlmesh/sa/registry"
    assert not leaf(certificate).subject
    key = leaf(certificate).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_a_leaf_is_signed_by_the_root_in_its_bundle(tmp_path: Path) -> None:
    certificate = authority(tmp_path).issue("registry", "mlmesh")
    (root,) = roots(certificate.bundle_pem)
    leaf(certificate).verify_directly_issued_by(root)


def test_a_leaf_lives_a_day_and_is_replaced_at_half_of_it(tmp_path: Path) -> None:
    certificate = authority(tmp_path).issue("registry", "mlmesh")
    assert leaf(certificate).not_valid_after_utc == NOW + timedelta(hours=24)
    assert certificate.rotate_at() == NOW + timedelta(hours=12)


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(seconds=-1), timedelta(hours=25)])
def test_a_life_of_nothing_or_of_more_than_a_day_is_refused(tmp_path: Path, ttl: timedelta) -> None:
    with pytest.raises(InvalidInput) as refused:
        authority(tmp_path).issue("registry", "mlmesh", ttl)
    assert refused.value.field == "ttl"


@pytest.mark.parametrize("name", ["", "Registry", "a/b", "../root", "x" * 64, "a\n"])
def test_only_names_of_kubernetes_become_identities(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        authority(tmp_path).issue(name, "mlmesh")
    with pytest.raises(InvalidInput):
        authority(tmp_path).issue("registry", name)


def test_keys_are_for_the_owner_only(tmp_path: Path) -> None:
    authority(tmp_path)
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    for name in ("root.pem", "root-key.pem"):
        assert stat.S_IMODE((tmp_path / "ca" / name).stat().st_mode) == 0o600


def test_the_root_is_kept_over_a_restart(tmp_path: Path) -> None:
    assert authority(tmp_path).bundle_pem == authority(tmp_path).bundle_pem


def test_a_new_root_is_trusted_before_it_signs_and_the_old_one_after(tmp_path: Path) -> None:
    mesh = authority(tmp_path)
    before = mesh.issue("registry", "mlmesh")
    (old,) = mesh.roots
    assert (mesh.phase, mesh.sequence) == ("IDLE", 1)

    mesh.prepare_root()
    between = mesh.issue("registry", "mlmesh")
    assert (mesh.phase, mesh.sequence) == ("DISTRIBUTING", 2)
    assert roots(between.bundle_pem)[0] == old
    assert len(roots(between.bundle_pem)) == 2
    leaf(between).verify_directly_issued_by(old)

    mesh.promote_root()
    after = mesh.issue("registry", "mlmesh")
    new = roots(after.bundle_pem)[0]
    assert (mesh.phase, roots(after.bundle_pem)) == ("RETIRING", [new, old])
    leaf(after).verify_directly_issued_by(new)
    assert mesh.is_signer(after)
    assert not mesh.is_signer(before)

    assert mesh.retire_roots() == 1
    assert (mesh.phase, mesh.sequence, mesh.roots) == ("IDLE", 3, (new,))


def test_what_was_begun_goes_on_after_a_restart(tmp_path: Path) -> None:
    authority(tmp_path).prepare_root()
    known = authority(tmp_path)
    assert known.phase == "DISTRIBUTING"
    known.prepare_root()
    assert authority(tmp_path).roots == known.roots
    known.promote_root()
    assert authority(tmp_path).phase == "RETIRING"
    assert len(authority(tmp_path, NOW + timedelta(days=3651)).roots) == 1


@pytest.mark.parametrize("written", ["key", "root"])
def test_a_crash_while_a_root_is_made_or_promoted_loses_nothing(tmp_path: Path, written: str) -> None:
    mesh = authority(tmp_path)
    (old,) = mesh.roots
    mesh.prepare_root()
    folder = tmp_path / "ca"
    if written == "key":
        (folder / "next" / "root.pem").unlink()
    else:
        (folder / "next" / "root.pem").replace(folder / "root.pem")
    again = authority(tmp_path)
    assert again.phase == "IDLE"
    assert (again.roots == (old,)) is (written == "key")
    assert again.is_signer(again.issue("registry", "mlmesh"))
    assert list((folder / "next").iterdir()) == []


def test_a_root_that_was_not_prepared_cannot_sign(tmp_path: Path) -> None:
    with pytest.raises(WrongState):
        authority(tmp_path).promote_root()


def test_an_old_root_is_needed_while_tools_have_certificates_of_it(tmp_path: Path) -> None:
    mesh = authority(tmp_path)
    mesh.lend("operator", "mlmesh", timedelta(hours=3))
    mesh.lend("operator", "mlmesh", timedelta(hours=1))
    assert mesh.lent_until is None
    mesh.prepare_root()
    mesh.promote_root()
    mesh.lend("operator", "mlmesh", timedelta(hours=24))
    assert authority(tmp_path).lent_until == NOW + timedelta(hours=3)
    mesh.retire_roots()
    assert mesh.lent_until is None


def test_the_bundle_as_others_read_it(tmp_path: Path) -> None:
    mesh = authority(tmp_path)
    mesh.prepare_root()
    bundle = json.loads(spiffe_bundle(mesh.roots, mesh.sequence))
    assert (bundle["spiffe_sequence"], len(bundle["keys"])) == (2, 2)
    for key, root in zip(bundle["keys"], mesh.roots, strict=True):
        assert (key["use"], key["kty"], key["crv"]) == ("x509-svid", "EC", "P-256")
        assert base64.b64decode(key["x5c"][0]) == root.public_bytes(Encoding.DER)
        numbers = root.public_key().public_numbers()  # type: ignore[union-attr]
        assert int.from_bytes(base64.urlsafe_b64decode(key["x"] + "="), "big") == numbers.x  # type: ignore[union-attr]


def test_an_expired_root_does_not_sign(tmp_path: Path) -> None:
    authority(tmp_path)
    with pytest.raises(Corrupt):
        authority(tmp_path, NOW + timedelta(days=3651)).issue("registry", "mlmesh")


def test_a_key_of_another_root_is_noticed(tmp_path: Path) -> None:
    authority(tmp_path / "one")
    authority(tmp_path / "other")
    (tmp_path / "other" / "ca" / "root-key.pem").replace(tmp_path / "one" / "ca" / "root-key.pem")
    with pytest.raises(Corrupt, match="belong together"):
        authority(tmp_path / "one")


def test_a_gateway_shows_dns_names_and_addresses(tmp_path: Path) -> None:
    certificate = authority(tmp_path).issue_server(["localhost", "a.mlmesh.svc.cluster.local"], ["127.0.0.1"])
    names = leaf(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "a.mlmesh.svc.cluster.local"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == []
