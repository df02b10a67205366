"""YAML of small meshes for tests with real Envoys."""

from __future__ import annotations


def deployment(name: str, app: str, account: str, *, version: str = "", replicas: int = 1) -> str:
    """A Deployment with a gRPC port."""
    labels = f"app: {app}" + (f", version: {version}" if version else "")
    return f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{{labels}}}}}
  template:
    metadata: {{labels: {{{labels}}}}}
    spec:
      serviceAccountName: {account}
      containers:
        - name: app
          command: [serve]
          ports: [{{name: grpc, containerPort: 9000}}]
---
"""


def service(app: str) -> str:
    """A Service and a ServiceAccount of one name."""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {app}}}
spec:
  selector: {{app: {app}}}
  ports: [{{name: grpc, port: 9000, targetPort: grpc}}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {app}}}
---
"""


GATEWAY_POD = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: gateway}
spec:
  selector: {matchLabels: {istio: gateway}}
  template:
    metadata: {labels: {istio: gateway}, annotations: {inject.istio.io/templates: gateway}}
    spec: {containers: [{name: istio-proxy, image: auto}]}
---
"""
"""A gateway, whose label is "istio: gateway"."""

STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
---
"""

SUBSETS = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: server}
spec:
  host: server
  subsets:
    - {name: v1, labels: {version: v1}}
    - {name: v2, labels: {version: v2}}
---
"""


def split(v1: int, v2: int, extra: str = "") -> str:
    """A VirtualService that splits by weight; `extra` is YAML of more fields of the rule, indented by six."""
    return f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: server}}
spec:
  hosts: [server]
  http:
    - name: split
      route:
        - {{destination: {{host: server, subset: v1}}, weight: {v1}}}
        - {{destination: {{host: server, subset: v2}}, weight: {v2}}}
{extra}
---
"""
