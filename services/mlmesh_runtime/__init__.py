"""What every process of the platform runs on. It knows gRPC and knows no domain.

The rooms, and the one thing to know of each:

- `errors`: what domain code raises; the caller's status and reason follow from the class. Imports nothing.
- `limits`: every bound, in one frozen value.
- `config`: `Settings.from_environment` and `VARIABLES`, the table of all environment variables.
- `server`: `Server` and `Service`:
  ``async with Server(settings, services=[...]) as server: await server.serve_until_signal()``. Health, reflection (v1
  and v1alpha), TLS with rotation, limits, deadlines, errors, metrics, traces and draining come with it. `run` is a
  process's entry.
- `channel`: `open_channel`: bounds, keepalive that notices a hung peer, a deadline on every call, trace context passed
  on, no retries. `mesh_error` turns a failed call into an error of `errors`.
- `calls`: the RPC being handled: `remaining_s`, `metadata_value`, `detached` for work that outlives it.
- `identity`: `current_identity`: the caller's SPIFFE id.
- `health`: `HealthStatuses`: per service and per model version.
- `telemetry`: `REGISTRY` of metrics, `span` and `record_span`, `Telemetry`. `logs`: JSON with trace ids.
- `executors`: named, bounded threads for blocking work.
- `chunks`: bytes in verified, resumable chunks, for both ends of uploads and downloads.
- `handlers`, `rpcs`, `streams`, `status`, `validation`, `reflection`, `tls`, `process`: how the above is done.

A servicer's method::

    async def GetModel(self, request, context):
        model = await self._store.get(model_id(request.name))      # raises NotFound, and that is all there is to it
        return registry_pb2.GetModelResponse(model=to_proto(model))
"""
