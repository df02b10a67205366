"""The analysis without any tool: codes, places, and what one does not want to hear."""

from __future__ import annotations

from mlmesh_local.resources import Document, ResourceSet, load_resources
from mlmesh_local.resources.analysis import CODES, analyze
from mlmesh_local.resources.analysis.reading import read_for_analysis

TEXT = """\
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: it
  namespace: shop
spec:
  hosts: [a]
  http:
    - route:
        - destination:
            host: nowhere
---
apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec: {selector: {app: a}, ports: [{name: metrics, port: 80}]}
"""


def load(text: str) -> ResourceSet:
    return load_resources([Document(source="it.yaml", text=text)])


def test_findings_are_sorted_by_severity_and_know_their_line() -> None:
    missing, naming = analyze(load(TEXT))
    assert (missing.code, missing.name, missing.level) == ("IST0101", "ReferencedResourceNotFound", "Error")
    assert (missing.at.line, missing.at.path) == (11, "spec.http[0].route[0].destination.host")
    assert str(missing).startswith("Error [IST0101] (VirtualService shop/it) it.yaml:11: ")
    assert (naming.code, naming.level, naming.origin) == ("IST0118", "Info", "Service shop/a")


def test_codes_can_be_suppressed_by_annotation_and_by_wish() -> None:
    quiet = TEXT.replace(
        "  namespace: shop\n", "  namespace: shop\n  annotations: {galley.istio.io/analyze-suppress: IST0101}\n"
    )
    assert [message.code for message in analyze(load(quiet))] == ["IST0118"]
    for wish in ("IST0118=Service shop/a", "IST0118=Service a.shop", "IST0118=Service *"):
        assert [message.code for message in analyze(load(TEXT), suppress=[wish])] == ["IST0101"]
    assert len(analyze(load(TEXT), suppress=["IST0101=Service *"])) == 2


def test_what_cannot_be_read_is_told_and_the_rest_is_analyzed() -> None:
    wrong = TEXT.replace("hosts: [a]", "hosts: [a]\n  htpp: 1")
    resources, messages = read_for_analysis([Document(source="it.yaml", text=wrong)], ResourceSet())
    (message,) = messages
    assert (message.code, message.origin, message.at.line) == ("IST0106", "VirtualService shop/it", 8)
    assert len(resources) == 2
    assert [one.code for one in analyze(resources)] == ["IST0101", "IST0118"]


def test_what_only_the_laptop_refuses_is_no_error() -> None:
    text = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: it, namespace: shop}
spec:
  selector: {matchLabels: {a: b}}
  template: {metadata: {labels: {a: b}}, spec: {hostNetwork: true, containers: [{name: x}]}}
"""
    _, messages = read_for_analysis([Document(source="it.yaml", text=text)], ResourceSet())
    assert {(message.code, message.level) for message in messages} == {("MLM0001", "Info")}


def test_codes_are_those_that_istio_documents() -> None:
    assert all(code.startswith(("IST0", "MLM0")) and len(code) == 7 for code in CODES)


def test_annotations_of_a_template_are_those_of_a_pod() -> None:
    """In a cluster Istio finds them at pods."""
    text = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: a, namespace: shop}
spec:
  selector: {matchLabels: {app: a}}
  template:
    metadata:
      labels: {app: a, sidecar.istio.io/inject: "true"}
      annotations:
        proxy.istio.io/confg: "{}"
        sidecar.istio.io/inject: "true"
        traffic.sidecar.istio.io/excludeInboundPorts: http
        networking.istio.io/exportTo: "*"
    spec: {containers: [{name: app, image: a}]}
"""
    found = {(message.code, message.at.line) for message in analyze(load(text))}
    assert found == {("IST0108", 10), ("IST0125", 12), ("IST0107", 13)}
