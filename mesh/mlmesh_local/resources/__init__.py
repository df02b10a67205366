"""Kubernetes and Istio resources: read, validated, merged, checked against each other. Knows no Envoy.

applied = ResourceSet().apply(load_resources(read_documents([Path("manifests/base"), Path("mesh/istio")])))
applied.resources.specs(Deployment)
"""

from mlmesh_local.resources.model import (
    AuthorizationPolicy,
    Container,
    Deployment,
    DestinationRule,
    EnvironmentVariable,
    Gateway,
    PeerAuthentication,
    Probe,
    Service,
    ServiceAccount,
    ServiceEntry,
    Telemetry,
    VirtualService,
)
from mlmesh_local.resources.parse import Document, load_resources, read_documents
from mlmesh_local.resources.problems import At, InvalidResource, Problem
from mlmesh_local.resources.resource_set import Applied, Change, Resource, ResourceSet

__all__ = [
    "Applied",
    "At",
    "AuthorizationPolicy",
    "Change",
    "Container",
    "Deployment",
    "DestinationRule",
    "Document",
    "EnvironmentVariable",
    "Gateway",
    "InvalidResource",
    "PeerAuthentication",
    "Probe",
    "Problem",
    "Resource",
    "ResourceSet",
    "Service",
    "ServiceAccount",
    "ServiceEntry",
    "Telemetry",
    "VirtualService",
    "load_resources",
    "read_documents",
]
