"""Write the EnvoyFilter that lets JSON clients in: `python tools/transcoding.py`.

Envoy's transcoder wants the protos' descriptors with google.api.http options. Ours carry none, since the Open Inference
Protocol's files are as they are on the wire everywhere: the rules come from manifests/overlays/json/http.yaml and are
put into a copy of the descriptors here. Run it after a change of the rules or of the protos; a test compares.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import yaml
from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, json_format
from google.rpc import error_details_pb2, status_pb2

ROOT = Path(__file__).resolve().parents[1]
OVERLAY = ROOT / "manifests" / "overlays" / "json"
SERVICE = "inference.GRPCInferenceService"
LINE = 100

HEAD = """\
# Written by `python tools/transcoding.py` from http.yaml and the protos; do not edit.
#
# The gateway takes JSON over HTTP beside gRPC: docs/json.md. The filter stands before authorization, so policies see
# the path of the RPC (/inference.GRPCInferenceService/ModelInfer), as they do for gRPC.
"""


def rules() -> dict[str, http_pb2.HttpRule]:
    """HTTP rules by the full name of their method."""
    found = {}
    for document in yaml.safe_load((OVERLAY / "http.yaml").read_text()):
        rule = json_format.ParseDict(document, http_pb2.HttpRule())
        found[rule.selector] = rule
        rule.ClearField("selector")
    return found


def descriptors() -> descriptor_pb2.FileDescriptorSet:
    """The protocol's files with the rules as options, and what errors carry; imports first, no comments."""
    everything = descriptor_pb2.FileDescriptorSet.FromString(
        (ROOT / "protos" / "mlmesh" / "descriptor_set.binpb").read_bytes()
    )
    by_name = {file.name: file for file in everything.file}
    result, seen = descriptor_pb2.FileDescriptorSet(), set[str]()

    def add(file: descriptor_pb2.FileDescriptorProto) -> None:
        if file.name in seen:
            return
        seen.add(file.name)
        for name in file.dependency:
            add(by_name[name] if name in by_name else _imported(name))
        kept = result.file.add()
        kept.CopyFrom(file)
        kept.ClearField("source_code_info")

    # Envoy explains errors (google.rpc.Status and its details) only by types it has descriptors of.
    for module in (annotations_pb2, status_pb2, error_details_pb2):
        add(_imported(module.DESCRIPTOR.name))
    add(by_name["open_inference/grpc_service.proto"])
    _annotate(result)
    return result


def _imported(name: str) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    descriptor_pool.Default().FindFileByName(name).CopyToProto(file)
    return file


def _annotate(files: descriptor_pb2.FileDescriptorSet) -> None:
    wanted = rules()
    for file in files.file:
        for service in file.service:
            for method in service.method:
                name = f"{file.package}.{service.name}"
                rule = wanted.pop(f"{name}.{method.name}", None)
                if rule is not None:
                    # A method with a rule is not mapped by itself any more.
                    rule.additional_bindings.add(post=f"/{name}/{method.name}", body="*")
                    method.options.Extensions[annotations_pb2.http].CopyFrom(rule)
                    if annotations_pb2.DESCRIPTOR.name not in file.dependency:
                        file.dependency.append(annotations_pb2.DESCRIPTOR.name)
    if wanted:
        raise SystemExit(f"http.yaml names methods that are not there: {', '.join(sorted(wanted))}")


def envoy_filter() -> dict[str, Any]:
    """The resource."""
    encoded = base64.b64encode(descriptors().SerializeToString(deterministic=True)).decode()
    transcoder = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "services": [SERVICE],
        # Every other method of the service: POST to its gRPC path.
        "auto_mapping": True,
        "convert_grpc_status": True,
        "print_options": {"preserve_proto_field_names": True, "always_print_enums_as_ints": False},
        "request_validation_options": {"reject_unknown_method": True, "reject_unknown_query_parameters": True},
        "proto_descriptor_bin": encoded,
    }
    return {
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "EnvoyFilter",
        "metadata": {
            "name": "json",
            "namespace": "mlmesh",
            # Istio says of every EnvoyFilter that it depends on Envoy's insides. This one does, and must.
            "annotations": {"galley.istio.io/analyze-suppress": "IST0133"},
        },
        "spec": {
            "workloadSelector": {"labels": {"istio": "ingressgateway"}},
            "configPatches": [
                {
                    "applyTo": "HTTP_FILTER",
                    "match": {
                        "context": "GATEWAY",
                        "listener": {
                            "filterChain": {"filter": {"name": "envoy.filters.network.http_connection_manager"}}
                        },
                    },
                    "patch": {
                        "operation": "INSERT_FIRST",
                        "value": {"name": "envoy.filters.http.grpc_json_transcoder", "typed_config": transcoder},
                    },
                }
            ],
        },
    }


def text() -> str:
    """The file."""
    return HEAD + yaml.safe_dump(envoy_filter(), sort_keys=False, width=LINE)


if __name__ == "__main__":
    (OVERLAY / "transcoder.yaml").write_text(text())
