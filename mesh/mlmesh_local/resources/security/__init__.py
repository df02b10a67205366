"""security.istio.io: PeerAuthentication, AuthorizationPolicy, RequestAuthentication.

https://istio.io/latest/docs/reference/config/security/. Rules of validity are those of Istio's own
pkg/config/validation/validation.go and of the CEL expressions in its CustomResourceDefinitions.
"""

from mlmesh_local.resources.security.peers import parse_peer_authentication
from mlmesh_local.resources.security.policies import parse_authorization_policy
from mlmesh_local.resources.security.requests import parse_request_authentication
from mlmesh_local.resources.security.scope import selector, targets
from mlmesh_local.resources.security.warnings import security_warnings

__all__ = [
    "parse_authorization_policy",
    "parse_peer_authentication",
    "parse_request_authentication",
    "security_warnings",
    "selector",
    "targets",
]
