"""JSON over HTTP at the gateway: Envoy turns it into gRPC, by the overlay's EnvoyFilter."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlmesh_cli.tensors import infer_request
from open_inference import grpc_service_pb2 as oip
from tests.integration.platform.test_calls import model_ready, tls_channel
from tests.support.live_platform import HOST, ROOT, Platform

OVERLAY = ROOT / "manifests" / "overlays" / "json" / "transcoder.yaml"
TIMEOUT_S = 10.0


class JsonClient:
    """Plain HTTP/1.1 with a certificate; the gateway is reached by address, its services by host name."""

    def __init__(self, address: str, context: ssl.SSLContext) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._context = context

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, the answer's JSON, its headers."""
        with (
            socket.create_connection((self._host, int(self._port)), TIMEOUT_S) as plain,
            self._context.wrap_socket(plain, server_hostname=HOST) as tls,
        ):
            connection = http.client.HTTPConnection(HOST)
            connection.sock = tls
            sent = {"content-type": "application/json", "grpc-timeout": "10S", **headers}
            connection.request(method, path, None if body is None else json.dumps(body), sent)
            response = connection.getresponse()
            content = response.read()
            got = {name.lower(): value for name, value in response.getheaders()}
            is_json = got.get("content-type") == "application/json"
            return response.status, json.loads(content) if is_json else content, got


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[JsonClient]:
    files = platform.certificate("inference")
    context = ssl.create_default_context(cafile=str(files["ca"]))
    context.load_cert_chain(files["cert"], files["key"])
    call = JsonClient(platform.gateway, context)
    platform.mlmesh("apply", "-f", OVERLAY)

    def answers() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return call("GET", "/v2/health/live")[0] == 200
        return False

    try:
        platform.wait("the gateway takes JSON", answers)
        yield call
    finally:
        platform.mlmesh("apply", "--prune", "-f", ROOT / "mesh" / "istio")


def test_health_and_metadata(client: JsonClient) -> None:
    assert client("GET", "/v2/health/live")[:2] == (200, {"live": True})
    status, ready, _ = client("GET", "/v2/models/mnist/ready")
    assert (status, ready) == (200, {"ready": True})
    status, metadata, headers = client("GET", "/v2/models/mnist")
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert (metadata["name"], metadata["inputs"][0]["name"]) == ("mnist", "image")
    # JSON of protobuf: 64 bit numbers are strings.
    assert metadata["inputs"][0]["shape"] == ["-1", "1", "28", "28"]


def test_inference_gives_what_grpc_gives(platform: Platform, client: JsonClient) -> None:
    import grpc

    image = np.random.default_rng(3).random((1, 1, 28, 28), np.float32)
    files = {name: path.read_bytes() for name, path in platform.certificate("inference").items()}
    with tls_channel(platform.gateway, root=files["ca"], key=files["key"], chain=files["cert"]) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelInferResponse.FromString,
        )
        assert isinstance(channel, grpc.Channel)
        answer = call(infer_request("mnist", [("image", "FP32", image)]), timeout=TIMEOUT_S)
        # gRPC passes the transcoder as it is.
        assert model_ready(channel).ready
    expected = np.frombuffer(answer.raw_output_contents[0], np.float32)
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28]}
    body = {"id": "j-1", "inputs": [{**tensor, "contents": {"fp32_contents": image.ravel().tolist()}}]}
    status, answer, _ = client("POST", "/v2/models/mnist/infer", body)
    assert (status, answer["id"], answer["model_version"]) == (200, "j-1", "1")
    output = answer["outputs"][0]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", ["1", "10"])
    np.testing.assert_allclose(output["contents"]["fp32_contents"], expected, atol=1e-4)
    # Any method by its gRPC path.
    assert client("POST", "/inference.GRPCInferenceService/ModelReady", {"name": "mnist"})[1] == {"ready": True}


def test_errors_are_json_with_their_reason(client: JsonClient) -> None:
    status, error, _ = client("POST", "/v2/models/nobody/infer", {"inputs": []})
    assert status == 404
    assert "nobody" in error["message"]
    assert error["details"][0]["reason"] == "MODEL_NOT_FOUND"
    wrong = {"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "contents": {"fp32_contents": [1.0]}}
    status, error, _ = client("POST", "/v2/models/mnist/infer", {"inputs": [wrong]})
    assert (status, error["code"]) == (400, 3)
    assert "Expected 3136, got 4" in error["message"]
    # What is no message, or no method, is refused at the gateway.
    assert client("GET", "/v2/nothing")[0] == 404
    assert client("POST", "/v2/models/mnist/infer", {"inputz": []})[0] == 400


def test_policies_hold_for_json(client: JsonClient) -> None:
    """The path that policies see is the RPC's: this certificate may ask for predictions and not load models."""
    status, _, _ = client("POST", "/inference.GRPCInferenceService/RepositoryModelLoad", {"model_name": "mnist"})
    assert status == 403
