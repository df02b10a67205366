"""Step 4, security: who gets in and who does not."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from mlmesh.training.v1 import training_pb2, training_pb2_grpc
from mlmesh_cli.certificates import WrittenCertificate, write_certificate
from mlmesh_cli.config import service_target
from mlmesh_cli.connection import find_instance
from mlmesh_cli.demo.story import Story
from mlmesh_cli.demo.tables import attempts_table

_DEADLINE_S = 5.0


async def outcome(channel: grpc.aio.Channel) -> str:
    """The status of a ListJobs call: "OK" or the code and message."""
    stub = training_pb2_grpc.TrainingServiceStub(channel)
    try:
        await stub.ListJobs(training_pb2.ListJobsRequest(page_size=1), timeout=_DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        # What happened last is what tells; that all addresses were tried says nothing.
        details = (error.details() or "").rpartition("last error: ")[2]
        return f"{error.code().name}: {details.removeprefix('UNAVAILABLE: ')}"
    return "OK"


@contextlib.asynccontextmanager
async def _gateway(address: str, certificate: WrittenCertificate | None, ca: Path) -> AsyncIterator[grpc.aio.Channel]:
    """A TLS channel to the ingress gateway, with or without a client certificate."""
    host = service_target("training")
    credentials = grpc.ssl_channel_credentials(
        root_certificates=ca.read_bytes(),  # noqa: ASYNC240  a few kilobytes
        private_key=certificate.key.read_bytes() if certificate else None,
        certificate_chain=certificate.cert.read_bytes() if certificate else None,
    )
    options = [("grpc.default_authority", host), ("grpc.ssl_target_name_override", host.partition(":")[0])]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        yield channel


async def who_gets_in(story: Story) -> None:
    """Plaintext, no certificate, the wrong identity, the right one."""
    status = await story.connection.status()
    pod = find_instance(status, "training").address
    gateway = next(g.address for g in status.gateways if g.tls_mode == "MUTUAL")
    control = await story.connection.control()
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        operator = await write_certificate(control, "operator", Path(folder) / "operator", ttl_s=600)
        inference = await write_certificate(control, "inference", Path(folder) / "inference", ttl_s=600)
        async with grpc.aio.insecure_channel(_with_port(pod)) as channel:
            rows.append(("plaintext, straight to the pod", await outcome(channel), "STRICT mTLS: no call gets in"))
        async with _gateway(gateway, None, operator.ca) as channel:
            rows.append(("TLS without a certificate, at the gateway", await outcome(channel), "the Gateway is MUTUAL"))
        async with _gateway(gateway, inference, operator.ca) as channel:
            what = "a valid identity, but not allowed to train"
            rows.append((f"as {_short(inference.identity)}, at the gateway", await outcome(channel), what))
        async with _gateway(gateway, operator, operator.ca) as channel:
            rows.append((f"as {_short(operator.identity)}, at the gateway", await outcome(channel), "allowed"))
    inside = await story.connection.channel("training", workload="inference-v1")
    rows.append(("as sa/inference, through its own sidecar", await outcome(inside), "AuthorizationPolicy `training`"))
    story.show(attempts_table(rows))
    results = [result for _, result, _ in rows]
    story.check("a call without TLS is refused", results[0].startswith("UNAVAILABLE"), results[0])
    story.check("a call without a certificate is refused", results[1].startswith("UNAVAILABLE"), results[1])
    denied = all(result.startswith("PERMISSION_DENIED") for result in (results[2], results[4]))
    story.check(
        "a caller without permission gets PERMISSION_DENIED", denied, f"{results[2]}, at the gateway and inside"
    )
    story.check("an operator's certificate is let in", results[3] == "OK", results[3])


def _short(identity: str) -> str:
    return "/".join(identity.split("/")[-2:])


def _with_port(address: str) -> str:
    return address if ":" in address else f"{address}:9000"
