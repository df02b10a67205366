"""Istio's standard metrics, made on the laptop from what Envoys report of every request and connection.

    directory = Directory.of(View(world))
    metrics = MeshMetrics(clock=time.monotonic)
    metrics.directory = directory
    metrics.http("client-0", "outbound", call)       # mlmesh_local.access_logs does this for every entry
    text = "".join(exposition(metrics))              # what Prometheus scrapes

Names, labels and their values are those of Istio's stats filter, which the Envoy of the laptop does not have:
https://istio.io/latest/docs/reference/config/metrics/. Pure: no sockets, no gRPC.
"""
