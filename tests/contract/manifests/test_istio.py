"""Istio's configuration: what it promises, and what Istio's own tools say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlmesh.registry.v1 import registry_pb2
from tests.support import manifests, tools

DOCS = manifests.documents(manifests.ISTIO)
BASE = manifests.documents(manifests.BASE)
# The kinds that the laptop mesh runs.
KINDS = {
    "VirtualService",
    "DestinationRule",
    "PeerAuthentication",
    "AuthorizationPolicy",
    "Gateway",
    "ServiceEntry",
    "Telemetry",
}
ACCOUNT = "cluster.local/ns/mlmesh/sa/"


def _policies() -> dict[str, Any]:
    return manifests.of_kind(DOCS, "AuthorizationPolicy")


def _paths(policy: str, account: str) -> set[str]:
    """Paths that a policy allows to an account of the mesh."""
    allowed: set[str] = set()
    for rule in _policies()[policy]["spec"]["rules"]:
        principals = [p for source in rule["from"] for p in source["source"]["principals"]]
        if ACCOUNT + account in principals:
            allowed.update(p for to in rule.get("to", []) for p in to["operation"]["paths"])
    return allowed


def test_only_kinds_that_the_laptop_mesh_runs() -> None:
    assert {d["kind"] for d in DOCS} <= KINDS


def test_nothing_is_plaintext() -> None:
    (peer,) = manifests.of_kind(DOCS, "PeerAuthentication").values()
    assert peer["spec"] == {"mtls": {"mode": "STRICT"}}
    for rule in manifests.of_kind(DOCS, "DestinationRule").values():
        assert rule["spec"]["trafficPolicy"]["tls"] == {"mode": "ISTIO_MUTUAL"}


def test_hosts_are_services() -> None:
    services = {f"{name}.mlmesh.svc.cluster.local": s for name, s in manifests.of_kind(BASE, "Service").items()}
    for rule in manifests.of_kind(DOCS, "DestinationRule").values():
        assert rule["spec"]["host"] in services
    for virtual in manifests.of_kind(DOCS, "VirtualService").values():
        assert set(virtual["spec"]["hosts"]) <= set(services)
        for route in virtual["spec"]["http"]:
            for target in route["route"]:
                ports = [p["port"] for p in services[target["destination"]["host"]]["spec"]["ports"]]
                # Named because the Service has two ports and the gateway listens on a third.
                assert target["destination"]["port"]["number"] in ports


def test_subsets_exist_and_select_pods() -> None:
    (rule,) = [r for r in manifests.of_kind(DOCS, "DestinationRule").values() if "subsets" in r["spec"]]
    pods = [d["spec"]["template"]["metadata"]["labels"] for d in manifests.of_kind(BASE, "Deployment").values()]
    for subset in rule["spec"]["subsets"]:
        assert any({"app": "inference", **subset["labels"]}.items() <= labels.items() for labels in pods)
    (route,) = manifests.of_kind(DOCS, "VirtualService")["inference"]["spec"]["http"]
    assert [(t["destination"]["subset"], t["weight"]) for t in route["route"]] == [("v1", 100), ("v2", 0)]
    assert {t["destination"]["subset"] for t in route["route"]} == {s["name"] for s in rule["spec"]["subsets"]}
    # A route's timeout cuts streams.
    assert "timeout" not in route


def test_everything_is_denied_first() -> None:
    assert _policies()["deny-by-default"]["spec"] == {}
    for name, policy in _policies().items():
        if name != "deny-by-default":
            assert policy["spec"]["action"] == "ALLOW"
            assert policy["spec"]["selector"]["matchLabels"]


def test_every_policy_selects_pods_and_names_accounts() -> None:
    pods = [d["spec"]["template"]["metadata"]["labels"] for d in manifests.of_kind(BASE, "Deployment").values()]
    accounts = {ACCOUNT + name for name in manifests.of_kind(BASE, "ServiceAccount")}
    for policy in _policies().values():
        if "selector" in policy["spec"]:
            assert any(policy["spec"]["selector"]["matchLabels"].items() <= labels.items() for labels in pods)
        for rule in policy["spec"].get("rules", []):
            for source in rule["from"]:
                assert set(source["source"]["principals"]) <= accounts | {"cluster.local/*"}


def test_who_may_do_what_in_the_registry() -> None:
    """Every method, so that a new one is thought of."""
    service = "/mlmesh.registry.v1.ModelRegistryService/"
    methods = [m.name for m in registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"].methods]
    assert f"{service}*" in _paths("registry", "operator")

    def denied(account: str) -> set[str]:
        allowed = _paths("registry", account)
        return {
            method
            for method in methods
            if not any(
                f"{service}{method}".startswith(path[:-1]) if path.endswith("*") else path == f"{service}{method}"
                for path in allowed
            )
        }

    operators_only = {
        "UpdateModel",
        "DeleteModel",
        "UndeleteModel",
        "SetModelVersionStage",
        "DeleteModelVersion",
        "UndeleteModelVersion",
        "DeleteModelAlias",
        "CollectGarbage",
        "SetQuota",
        "ListAuditEntries",
    }
    publishing = {
        "CreateModel",
        "CreateModelVersion",
        "AddModelVersionSignature",
        "VerifyModelVersion",
        "SetModelAlias",
        "StartUpload",
        "UploadChunks",
        "FinishUpload",
        "CancelUpload",
    }
    assert denied("training") == operators_only
    assert denied("inference") == operators_only | publishing


def test_who_may_train_and_infer() -> None:
    training = "/mlmesh.training.v1.TrainingService/*"
    assert training in _paths("training", "operator")
    assert not _paths("training", "inference")
    assert not _paths("training", "training")
    for account in ("operator", "ingressgateway", "inference"):
        assert "/inference.GRPCInferenceService/*" in _paths("inference", account)
    assert not _paths("inference", "training")


def test_paths_are_methods_that_exist() -> None:
    """A path of a policy that matches no method of ours is a typing error that denies in silence."""
    from google.protobuf import descriptor_pb2

    image = descriptor_pb2.FileDescriptorSet()
    image.ParseFromString((manifests.ROOT / "protos" / "mlmesh" / "descriptor_set.binpb").read_bytes())
    methods = [f"/{f.package}.{s.name}/{m.name}" for f in image.file for s in f.service for m in s.method]
    methods += ["/grpc.health.v1.Health/Check"]
    methods += [f"/grpc.reflection.{v}.ServerReflection/ServerReflectionInfo" for v in ("v1", "v1alpha")]
    for policy in _policies().values():
        for rule in policy["spec"].get("rules", []):
            for path in [p for to in rule.get("to", []) for p in to["operation"]["paths"]]:
                if path.endswith("*"):
                    assert any(method.startswith(path[:-1]) for method in methods), path
                else:
                    assert path in methods, path


def test_through_the_gateway_only_operators_reach_more_than_inference() -> None:
    rules = _policies()["ingressgateway"]["spec"]["rules"]
    unlimited = [r for r in rules if "to" not in r]
    assert [r["from"][0]["source"]["principals"] for r in unlimited] == [[ACCOUNT + "operator"]]
    for rule in rules:
        for path in [p for to in rule.get("to", []) for p in to["operation"]["paths"]]:
            assert path.startswith(("/inference.", "/grpc.health."))


def test_the_gateway_demands_a_certificate() -> None:
    (gateway,) = manifests.of_kind(DOCS, "Gateway").values()
    (server,) = gateway["spec"]["servers"]
    assert server["port"] == {"number": 8443, "name": "tls-grpc", "protocol": "HTTPS"}
    assert server["tls"] == {"mode": "MUTUAL", "credentialName": "ingress-cert"}
    routed = {
        host
        for virtual in manifests.of_kind(DOCS, "VirtualService").values()
        if "mlmesh" in virtual["spec"]["gateways"]
        for host in virtual["spec"]["hosts"]
    }
    assert set(server["hosts"]) == routed


def _validate(path: Path) -> tuple[int, str]:
    done = tools.run("istioctl", "validate", "-f", path)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("folder", [manifests.ISTIO, manifests.BASE], ids=["istio", "base"])
def test_istioctl_validate_has_nothing_to_say(folder: Path) -> None:
    code, output = _validate(folder)
    assert code == 0, output
    assert [line for line in output.splitlines() if line and not line.endswith(" is valid")] == []


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "json"])
def test_istioctl_analyze_has_nothing_to_say(overlay: str, tmp_path: Path) -> None:
    rendered = tmp_path / "all.yaml"
    rendered.write_text(yaml.safe_dump_all(manifests.render(manifests.OVERLAYS / overlay)))
    done = tools.run("istioctl", "analyze", "-A", "--use-kube=false", "--failure-threshold", "Info", rendered)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No validation issues found" in done.stdout + done.stderr


def test_istioctl_refuses_what_is_wrong(tmp_path: Path) -> None:
    virtual = manifests.of_kind(DOCS, "VirtualService")["inference"]
    virtual = yaml.safe_load(yaml.safe_dump(virtual))
    virtual["spec"]["http"][0]["route"][0]["weight"] = -1
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(virtual))
    code, output = _validate(wrong)
    assert code != 0
    assert "weight" in output


def test_istioctl_analyze_finds_a_missing_subset(tmp_path: Path) -> None:
    docs = manifests.render(manifests.OVERLAYS / "cpu")
    rule = manifests.of_kind(docs, "DestinationRule")["inference"]
    rule["spec"]["subsets"].pop()
    rendered = tmp_path / "all.yaml"
    rendered.write_text(yaml.safe_dump_all(docs))
    done = tools.run("istioctl", "analyze", "-A", "--use-kube=false", rendered)
    assert "IST0101" in done.stdout + done.stderr
