"""The laptop mesh driven by Istio's own control plane.

Istio's pilot-discovery runs as a child; it reads the resources from a small Kubernetes API that the supervisor serves
on loopback, and what it sends for each sidecar is adapted to an upstream Envoy on a machine without iptables.
"""
