from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from mlmesh_local.certificates import Certificates, ServerCredential
from mlmesh_local.model import CertificateSecret, ProxyNode, Secret, TrustSecret
from mlmesh_local.pki import Authority

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


class Sink:
    def __init__(self) -> None:
        self.secrets: dict[str, Mapping[str, Secret]] = {}
        self.pushes = 0

    def set_secrets(self, node_id: str, secrets: Mapping[str, Secret]) -> None:
        self.secrets[node_id] = secrets
        self.pushes += 1


class World:
    """Certificates with a clock that a test moves."""

    def __init__(self, folder: Path) -> None:
        self.now = START
        self.sink = Sink()
        self.changes = 0
        authority = Authority(folder, clock=lambda: self.now)
        self.certificates = Certificates(authority, self.sink, clock=lambda: self.now, changed=self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def serial(self, node_id: str) -> str:
        leaf = self.certificates.leaf(node_id)
        assert leaf is not None
        return leaf.serial


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def node(node_id: str, account: str = "registry") -> ProxyNode:
    return ProxyNode(id=node_id, namespace="mlmesh", service_account=account, labels={}, pod_address="127.64.1.1")


def test_a_gateway_shows_the_outside_what_tools_know_until_they_need_it_no_more(world: World) -> None:
    authority = world.certificates.authority
    world.certificates.provide(node("gateway-0"), (ServerCredential(name="in", hosts=("a.example",)),))
    before = world.sink.secrets["gateway-0"]
    authority.prepare_root()
    authority.promote_root()
    assert world.certificates.rotate_foreign(servers=False) == 1
    between = world.sink.secrets["gateway-0"]
    assert between["default"] != before["default"]
    assert between["kubernetes://in"] == before["kubernetes://in"]
    assert world.certificates.rotate_foreign(servers=False) == 0
    assert world.certificates.rotate_foreign(servers=True) == 1
    assert world.sink.secrets["gateway-0"]["kubernetes://in"] != before["kubernetes://in"]
    assert world.certificates.rotate_foreign(servers=True) == 0


def test_another_trust_domain_is_another_identity(world: World) -> None:
    world.certificates.provide(node("registry-0"), ())
    serial = world.serial("registry-0")
    world.certificates.provide(node("registry-0"), (), trust_domain="cluster.local")
    assert world.serial("registry-0") == serial
    world.certificates.provide(node("registry-0"), (), trust_domain="corp.example")
    leaf = world.certificates.leaf("registry-0")
    assert leaf is not None
    assert leaf.identity == "spiffe://corp.example/ns/mlmesh/sa/registry"
    world.certificates.rotate()
    assert world.certificates.leaf("registry-0").identity == leaf.identity  # type: ignore[union-attr]


def test_a_node_gets_its_certificate_once(world: World) -> None:
    world.certificates.provide(node("registry-0"), ())
    serial = world.serial("registry-0")
    world.certificates.provide(node("registry-0"), ())
    assert (world.serial("registry-0"), world.sink.pushes) == (serial, 1)
    secret = world.sink.secrets["registry-0"]["default"]
    assert isinstance(secret, CertificateSecret)
    certificate = x509.load_pem_x509_certificate(secret.certificate_chain)
    assert f"{certificate.serial_number:x}" == serial
    trust = world.sink.secrets["registry-0"]["ROOTCA"]
    assert isinstance(trust, TrustSecret)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(trust.roots))


def test_another_account_or_another_credential_is_another_certificate(world: World) -> None:
    world.certificates.provide(node("a"), ())
    first = world.serial("a")
    world.certificates.provide(node("a", "training"), ())
    second = world.serial("a")
    world.certificates.provide(node("a", "training"), (ServerCredential(name="ingress", hosts=("localhost",)),))
    assert len({first, second, world.serial("a")}) == 3
    assert {"kubernetes://ingress", "kubernetes://ingress-cacert"} <= set(world.sink.secrets["a"])


def test_certificates_are_replaced_at_half_of_their_life_each_in_its_own_time(world: World) -> None:
    world.certificates.provide(node("early"), ())
    world.now = START + timedelta(hours=6)
    world.certificates.provide(node("late"), ())
    early, late = world.serial("early"), world.serial("late")
    world.now = START + timedelta(hours=12) - timedelta(seconds=1)
    assert world.certificates.rotate_due() == 0
    world.now = START + timedelta(hours=12)
    assert world.certificates.rotate_due() == 1
    assert world.serial("early") != early
    assert world.serial("late") == late
    assert world.changes == 1
    assert world.certificates.rotate_due() == 0


def test_everybody_gets_a_new_one_on_demand_and_who_is_gone_does_not(world: World) -> None:
    for name in ("a", "b", "gone"):
        world.certificates.provide(node(name), ())
    before = {name: world.serial(name) for name in ("a", "b")}
    world.certificates.forget("gone")
    assert world.certificates.rotate() == 2
    assert all(world.serial(name) != serial for name, serial in before.items())
    assert world.certificates.leaf("gone") is None
