"""The Kubernetes Gateway API: read, converted into Istio's own resources, and its statuses told."""
