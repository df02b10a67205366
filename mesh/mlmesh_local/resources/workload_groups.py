"""WorkloadGroup: https://istio.io/latest/docs/reference/config/networking/workload-group/.

A template for workloads outside of a cluster that register themselves with Istio's control plane. On a laptop nobody
does: it is validated as by Istio, and means nothing.
"""

from __future__ import annotations

import re

from mlmesh_local.resources.checked import labels
from mlmesh_local.resources.domains import is_label
from mlmesh_local.resources.fields import INT32_MAX, Fields
from mlmesh_local.resources.gateways import UNIX
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_hosts import WorkloadGroup

WHY_UNUSED = "a template for workloads that register themselves, which a laptop does not have"
_NUMBERS = ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold")
_CHECKS = ("httpGet", "tcpSocket", "exec", "grpc")
_ADDRESS_MAX = 256
_ACCOUNT_MAX = 253
_HEADER = re.compile(r"^[-_A-Za-z0-9]+\Z")


def parse_workload_group(meta: Meta, spec: Fields) -> WorkloadGroup:
    """Read a WorkloadGroup's spec."""
    with spec.message("metadata") as inner:
        labels(inner, "labels")
        inner.text_map("annotations")
    if spec.required("template"):
        with spec.message("template") as inner:
            _template(inner)
    if spec.has("probe"):
        with spec.message("probe") as inner:
            _probe(inner)
    spec.ignored("probe")
    return WorkloadGroup(meta=meta)


def _template(fields: Fields) -> None:
    """What the schema says of it: Istio looks at it when a workload registers, with its own address."""
    address = fields.text("address")
    path = address.removeprefix(UNIX)
    if len(address) > _ADDRESS_MAX or (path != address and (path[:1] not in ("/", "@") or path.endswith("/"))):
        fields.refuse("address", f'"{address}" is not an address')
    with fields.message("ports") as inner:
        for name in inner.names():
            inner.port(name)
            if not is_label(name.lower()):
                inner.refuse(name, "is not a DNS label")
    if fields.has("ports") and address.startswith(UNIX):
        fields.refuse("ports", "does not go with a unix socket")
    if len(fields.text("serviceAccount")) > _ACCOUNT_MAX:
        fields.refuse("serviceAccount", f"must have at most {_ACCOUNT_MAX} characters")
    fields.text_map("labels")
    fields.text("locality")
    fields.text("network")
    fields.integer("weight")


def _probe(fields: Fields) -> None:
    for name in _NUMBERS:
        fields.integer(name, high=INT32_MAX)
    chosen = fields.one_of(*_CHECKS, required=True)
    with fields.message("httpGet") as inner:
        inner.text("path")
        inner.text("host")
        inner.port("port", required=chosen == "httpGet")
        inner.choice("scheme", ("", "HTTP", "HTTPS"))
        for header in inner.messages("httpHeaders"):
            with header:
                name = header.text("name")
                header.text("value")
                if not _HEADER.match(name):
                    header.refuse("name", f'"{name}" is not the name of a header')
    with fields.message("tcpSocket") as inner:
        inner.text("host")
        inner.port("port", required=chosen == "tcpSocket")
    with fields.message("exec") as inner:
        if not inner.texts("command") and chosen == "exec":
            inner.problems.add(inner.at, '"command" is required')
    fields.unsupported("grpc", why="Istio's own validation does not take it")
