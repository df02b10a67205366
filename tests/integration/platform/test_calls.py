"""What callers get through the mesh: stock clients, identities, permissions."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest

from mlmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from mlmesh.training.v1 import training_pb2, training_pb2_grpc
from mlmesh_cli import samples
from open_inference import grpc_service_pb2 as oip
from open_inference import grpc_service_pb2_grpc as oip_grpc
from tests.support.live_platform import HOST, Platform
from tests.support.pki import Authority, spiffe

INSTANCES = ("inference-v1-0", "inference-v1-1", "inference-v2-0")
COUNT = 32


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return samples.load("mnist").images[:COUNT]


@pytest.fixture(scope="module")
def expected(platform: Platform, images: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Logits of the registered file, run in this process."""
    folder = tmp_path_factory.mktemp("model")
    platform.mlmesh("models", "download", "mnist/1", "--to", folder)
    session = onnxruntime.InferenceSession(str(next(folder.rglob("*.onnx"))), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": images})[0]


def triton(platform: Platform, module: Any) -> Any:
    files = platform.certificate("inference")
    return module.InferenceServerClient(
        platform.gateway,
        ssl=True,
        root_certificates=str(files["ca"]),
        private_key=str(files["key"]),
        certificate_chain=str(files["cert"]),
        channel_args=[("grpc.ssl_target_name_override", HOST), ("grpc.default_authority", HOST)],
    )


def test_stock_client_unary(platform: Platform, images: Any, expected: Any) -> None:
    import tritonclient.grpc as client

    with triton(platform, client) as connection:
        assert connection.is_server_live(client_timeout=10)
        assert connection.is_model_ready("mnist", client_timeout=10)
        tensor = client.InferInput("image", [COUNT, 1, 28, 28], "FP32")
        tensor.set_data_from_numpy(images)
        result = connection.infer("mnist", [tensor], request_id="r-1", client_timeout=10)
        np.testing.assert_allclose(result.as_numpy("logits"), expected, atol=1e-4)
        assert result.get_response().id == "r-1"
        assert result.get_response().model_version == "1"


async def test_stock_client_stream(platform: Platform, images: Any, expected: Any) -> None:
    import tritonclient.grpc.aio as client

    async def requests() -> Any:
        for index in range(COUNT):
            tensor = client.InferInput("image", [1, 1, 28, 28], "FP32")
            tensor.set_data_from_numpy(images[index : index + 1])
            yield {"model_name": "mnist", "inputs": [tensor], "request_id": str(index)}

    connection = triton(platform, client)
    try:
        answers = []
        async for result, error in connection.stream_infer(requests(), stream_timeout=20):
            assert error is None
            answers.append((result.get_response().id, result.as_numpy("logits")))
    finally:
        await connection.close()
    assert [identity for identity, _ in answers] == [str(index) for index in range(COUNT)]
    np.testing.assert_allclose(np.concatenate([logits for _, logits in answers]), expected, atol=1e-4)


def model_ready(channel: grpc.Channel) -> oip.ModelReadyResponse:
    return oip_grpc.GRPCInferenceServiceStub(channel).ModelReady(oip.ModelReadyRequest(name="mnist"), timeout=30)


def pod(platform: Platform, instance: str = "inference-v1-0") -> str:
    address: str = platform.instance(instance).address
    return address if ":" in address else f"{address}:9000"


def tls_channel(address: str, *, root: bytes, key: bytes, chain: bytes, name: str = HOST) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    options = [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
    return grpc.secure_channel(address, credentials, options)


def test_plaintext_is_refused_before_any_handler(platform: Platform) -> None:
    before = platform.started_calls(*INSTANCES)
    for address in (pod(platform), platform.gateway):
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            model_ready(channel)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert platform.started_calls(*INSTANCES) == before


@pytest.mark.parametrize("service_account", ["operator", "inference"])
def test_forged_identity_is_refused_before_any_handler(platform: Platform, service_account: str) -> None:
    """The right SPIFFE id, signed by somebody else's authority."""
    before = platform.started_calls(*INSTANCES)
    forged = Authority().leaf(spiffe(service_account))
    roots = platform.certificate("operator")["ca"].read_bytes()
    channel = tls_channel(platform.gateway, root=roots, key=forged.key, chain=forged.cert)
    with channel, pytest.raises(grpc.RpcError) as refused:
        model_ready(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _raw_handshake(pod(platform), forged.cert, forged.key, Path(platform.folder))
    assert platform.started_calls(*INSTANCES) == before


def test_no_certificate_is_refused_before_any_handler(platform: Platform) -> None:
    before = platform.started_calls(*INSTANCES)
    roots = platform.certificate("operator")["ca"].read_bytes()
    options = [("grpc.ssl_target_name_override", HOST), ("grpc.default_authority", HOST)]
    channel = grpc.secure_channel(platform.gateway, grpc.ssl_channel_credentials(roots), options)
    with channel, pytest.raises(grpc.RpcError) as refused:
        model_ready(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _raw_handshake(pod(platform), b"", b"", Path(platform.folder))
    assert platform.started_calls(*INSTANCES) == before


def _raw_handshake(address: str, cert: bytes, key: bytes, folder: Path) -> None:
    """TLS to a sidecar without checking it: raises what the sidecar's refusal raises."""
    import socket

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if cert:
        (folder / "forged.pem").write_bytes(cert + key)
        context.load_cert_chain(folder / "forged.pem")
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as plain, context.wrap_socket(plain) as tls:
        # With TLS 1.3 the server's refusal arrives after the client's own handshake is done.
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        if tls.recv(16) == b"":
            raise ConnectionResetError("closed by the sidecar")


def test_forged_header_does_not_make_an_operator(platform: Platform) -> None:
    """A caller with the identity `inference` says in a header that it is `operator`."""
    files = {name: path.read_bytes() for name, path in platform.certificate("inference").items()}
    name = "training.mlmesh.svc.cluster.local"
    metadata = (("x-forwarded-client-cert", f"URI={spiffe('operator')}"),)
    channel = tls_channel(platform.gateway, root=files["ca"], key=files["key"], chain=files["cert"], name=name)
    with channel, pytest.raises(grpc.RpcError) as refused:
        training_pb2_grpc.TrainingServiceStub(channel).ListJobs(
            training_pb2.ListJobsRequest(), timeout=30, metadata=metadata
        )
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_caller_without_permission(platform: Platform) -> None:
    """Inference reads the registry and may not write to it; the registry's handler never sees the call."""
    options = [("grpc.default_authority", "registry.mlmesh.svc.cluster.local:9000")]
    with grpc.insecure_channel(platform.outbound("inference-v1-0"), options) as channel:
        registry = registry_pb2_grpc.ModelRegistryServiceStub(channel)
        assert (
            registry.GetModel(registry_pb2.GetModelRequest(name="models/mnist"), timeout=20).model.latest_version >= 2
        )
        with pytest.raises(grpc.RpcError) as refused:
            registry.CreateModel(registry_pb2.CreateModelRequest(model_id="not-mine"), timeout=30)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_publisher_is_the_identity_in_the_certificate(platform: Platform) -> None:
    version = platform.json("models", "show", "mnist/1")
    assert spiffe("training") in str(version)
