"""AuthorizationPolicies as Envoy's RBAC and ext_authz.

HTTP rules are configured on routes, the external authorizer by ECDS: listeners stay as they are, and a change acts at
once on connections that are already open. Rules of TCP ports are in their filter chains, since Envoy looks at a
connection only once: Istio's way, a changed chain that is drained, is what ends those that are no longer allowed.
"""

from mlmesh_local.translate.authorization.filters import (
    ALLOW_FILTER,
    AUDIT_FILTER,
    AUTHORIZER_FILTER,
    CUSTOM_FILTER,
    DENY_FILTER,
    authorization,
    authorization_extensions,
    authorization_filters,
    network_checks,
)
from mlmesh_local.translate.authorization.policies import attached
from mlmesh_local.translate.authorization.rules import NEVER

__all__ = [
    "ALLOW_FILTER",
    "AUDIT_FILTER",
    "AUTHORIZER_FILTER",
    "CUSTOM_FILTER",
    "DENY_FILTER",
    "NEVER",
    "attached",
    "authorization",
    "authorization_extensions",
    "authorization_filters",
    "network_checks",
]
