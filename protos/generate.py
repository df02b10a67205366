"""Generate the stubs in place: a command (`python protos/generate.py`) and the hatch build hook.

What it writes, all ignored by git and carried by the wheel and the sdist:

- ``protos/mlmesh/**``: messages, gRPC stubs and their types, plus ``mlmesh/descriptor_set.binpb`` (with source info and
  imports) for grpcurl and buf.
- ``protos/open_inference/**``: the same, in a descriptor pool of its own: its symbols (package ``inference``)
  are also registered by ``tritonclient`` and others, and one pool takes a symbol once.
- ``protos/buf/validate``: the module that ``protovalidate`` (1.x) expects its user to generate; its descriptor is read
  out of the protovalidate 2.x wheel.
- ``mesh/mlmesh_local/envoy.binpb``: descriptors of the Envoy messages that the laptop mesh sends, read out of the
  ``xds-protos`` wheel. Importing that wheel beside opentelemetry-proto would clash; reading it does not.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
import tempfile
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

PROTOS = Path(__file__).resolve().parent
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi", "*.binpb")
ENVOY_OUT = PROTOS.parent / "mesh" / "mlmesh_local" / "envoy.binpb"

# What the laptop mesh sends to Envoy; everything these import comes along.
ENVOY_ROOTS = (
    "envoy/admin/v3/config_dump.proto",
    "envoy/config/accesslog/v3/accesslog.proto",
    "envoy/config/bootstrap/v3/bootstrap.proto",
    "envoy/config/cluster/v3/cluster.proto",
    "envoy/config/core/v3/extension.proto",
    "envoy/config/endpoint/v3/endpoint.proto",
    "envoy/config/listener/v3/listener.proto",
    "envoy/config/metrics/v3/stats.proto",
    "envoy/config/rbac/v3/rbac.proto",
    "envoy/config/route/v3/route.proto",
    "envoy/config/trace/v3/datadog.proto",
    "envoy/config/trace/v3/opentelemetry.proto",
    "envoy/config/trace/v3/skywalking.proto",
    "envoy/config/trace/v3/zipkin.proto",
    "envoy/data/accesslog/v3/accesslog.proto",
    "envoy/extensions/access_loggers/file/v3/file.proto",
    "envoy/extensions/access_loggers/filters/cel/v3/cel.proto",
    "envoy/extensions/access_loggers/grpc/v3/als.proto",
    "envoy/extensions/access_loggers/open_telemetry/v3/logs_service.proto",
    "envoy/extensions/access_loggers/stream/v3/stream.proto",
    "envoy/extensions/clusters/aggregate/v3/cluster.proto",
    "envoy/extensions/clusters/dynamic_forward_proxy/v3/cluster.proto",
    "envoy/extensions/compression/brotli/compressor/v3/brotli.proto",
    "envoy/extensions/compression/gzip/compressor/v3/gzip.proto",
    "envoy/extensions/compression/gzip/decompressor/v3/gzip.proto",
    "envoy/extensions/filters/common/fault/v3/fault.proto",
    "envoy/extensions/filters/http/adaptive_concurrency/v3/adaptive_concurrency.proto",
    "envoy/extensions/filters/http/admission_control/v3/admission_control.proto",
    "envoy/extensions/filters/http/bandwidth_limit/v3/bandwidth_limit.proto",
    "envoy/extensions/filters/http/buffer/v3/buffer.proto",
    "envoy/extensions/filters/http/compressor/v3/compressor.proto",
    "envoy/extensions/filters/http/cors/v3/cors.proto",
    "envoy/extensions/filters/http/decompressor/v3/decompressor.proto",
    "envoy/extensions/filters/http/dynamic_forward_proxy/v3/dynamic_forward_proxy.proto",
    "envoy/extensions/filters/http/ext_authz/v3/ext_authz.proto",
    "envoy/extensions/filters/http/ext_proc/v3/ext_proc.proto",
    "envoy/extensions/filters/http/fault/v3/fault.proto",
    "envoy/extensions/filters/http/grpc_json_transcoder/v3/transcoder.proto",
    "envoy/extensions/filters/http/grpc_stats/v3/config.proto",
    "envoy/extensions/filters/http/grpc_web/v3/grpc_web.proto",
    "envoy/extensions/filters/http/header_mutation/v3/header_mutation.proto",
    "envoy/extensions/filters/http/header_to_metadata/v3/header_to_metadata.proto",
    "envoy/extensions/filters/http/health_check/v3/health_check.proto",
    "envoy/extensions/filters/http/json_to_metadata/v3/json_to_metadata.proto",
    "envoy/extensions/filters/http/jwt_authn/v3/config.proto",
    "envoy/extensions/filters/http/local_ratelimit/v3/local_rate_limit.proto",
    "envoy/extensions/filters/http/lua/v3/lua.proto",
    "envoy/extensions/filters/http/ratelimit/v3/rate_limit.proto",
    "envoy/extensions/filters/http/rbac/v3/rbac.proto",
    "envoy/extensions/filters/http/router/v3/router.proto",
    "envoy/extensions/filters/http/set_filter_state/v3/set_filter_state.proto",
    "envoy/extensions/filters/http/stateful_session/v3/stateful_session.proto",
    "envoy/extensions/filters/listener/http_inspector/v3/http_inspector.proto",
    "envoy/extensions/filters/listener/original_dst/v3/original_dst.proto",
    "envoy/extensions/filters/listener/proxy_protocol/v3/proxy_protocol.proto",
    "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
    "envoy/extensions/filters/network/ext_authz/v3/ext_authz.proto",
    "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
    "envoy/extensions/filters/network/mongo_proxy/v3/mongo_proxy.proto",
    "envoy/extensions/filters/network/rbac/v3/rbac.proto",
    "envoy/extensions/filters/network/sni_dynamic_forward_proxy/v3/sni_dynamic_forward_proxy.proto",
    "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
    "envoy/extensions/formatter/req_without_query/v3/req_without_query.proto",
    "envoy/extensions/load_balancing_policies/cluster_provided/v3/cluster_provided.proto",
    "envoy/extensions/load_balancing_policies/least_request/v3/least_request.proto",
    "envoy/extensions/load_balancing_policies/maglev/v3/maglev.proto",
    "envoy/extensions/load_balancing_policies/random/v3/random.proto",
    "envoy/extensions/load_balancing_policies/ring_hash/v3/ring_hash.proto",
    "envoy/extensions/load_balancing_policies/round_robin/v3/round_robin.proto",
    "envoy/extensions/load_balancing_policies/wrr_locality/v3/wrr_locality.proto",
    "envoy/extensions/network/dns_resolver/cares/v3/cares_dns_resolver.proto",
    "envoy/extensions/path/match/uri_template/v3/uri_template_match.proto",
    "envoy/extensions/path/rewrite/uri_template/v3/uri_template_rewrite.proto",
    "envoy/extensions/rbac/audit_loggers/stream/v3/stream.proto",
    "envoy/extensions/request_id/uuid/v3/uuid.proto",
    "envoy/extensions/retry/host/previous_hosts/v3/previous_hosts.proto",
    "envoy/extensions/retry/priority/previous_priorities/v3/previous_priorities_config.proto",
    "envoy/extensions/tracers/opentelemetry/resource_detectors/v3/environment_resource_detector.proto",
    "envoy/extensions/tracers/opentelemetry/resource_detectors/v3/static_config_resource_detector.proto",
    "envoy/extensions/tracers/opentelemetry/samplers/v3/dynatrace_sampler.proto",
    "envoy/extensions/transport_sockets/http_11_proxy/v3/upstream_http_11_connect.proto",
    "envoy/extensions/transport_sockets/proxy_protocol/v3/upstream_proxy_protocol.proto",
    "envoy/extensions/transport_sockets/raw_buffer/v3/raw_buffer.proto",
    "envoy/extensions/transport_sockets/tls/v3/secret.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls.proto",
    "envoy/extensions/upstreams/http/v3/http_protocol_options.proto",
    "envoy/service/accesslog/v3/als.proto",
    "envoy/service/auth/v3/external_auth.proto",
    "envoy/service/discovery/v3/ads.proto",
    "envoy/service/discovery/v3/discovery.proto",
    "envoy/service/status/v3/csds.proto",
    "envoy/type/matcher/v3/http_inputs.proto",
)


def generate() -> None:
    """Write every generated file that differs. Raises RuntimeError when a generator is missing or refuses.

    Files are replaced one by one and only at the end: what runs from this tree meanwhile finds all of them.
    """
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "out"
        out.mkdir()
        validate = Path(tmp) / "validate.binpb"
        validate.write_bytes(_validate_descriptors().SerializeToString())
        _copy_operations(Path(tmp) / "include")
        sources = sorted(str(p.relative_to(PROTOS)) for p in (PROTOS / "mlmesh").rglob("*.proto"))
        oip = sorted(str(p.relative_to(PROTOS)) for p in (PROTOS / "open_inference").rglob("*.proto"))
        _protoc(sources, validate, out, grpc=True)
        _protoc(["buf/validate/validate.proto"], validate, out, grpc=False)
        _protoc(oip, validate, out, grpc=True)
        _descriptor_set([*sources, *oip], validate, out / "mlmesh" / "descriptor_set.binpb")
        _privatise(out / "open_inference")
        for package in ("mlmesh", "open_inference"):
            _packages(out / package)
        for folder in ("mlmesh", "open_inference", "buf"):
            _replace(out / folder, PROTOS / folder)
    ENVOY_OUT.parent.mkdir(parents=True, exist_ok=True)
    _write(ENVOY_OUT, _envoy_descriptors().SerializeToString(deterministic=True))


def _copy_operations(folder: Path) -> None:
    """Lay out google/longrunning/operations.proto: its wheel ships it under another name than its own."""
    source = Path(distribution("googleapis-common-protos").locate_file("google/longrunning/operations_proto.proto"))
    target = folder / "google" / "longrunning" / "operations.proto"
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)


def _replace(made: Path, folder: Path) -> None:
    """Bring the generated files of `folder` to what was made; what is no longer generated goes."""
    fresh = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    for relative in sorted(fresh):
        _write(folder / relative, (made / relative).read_bytes())
    for pattern in GENERATED:
        for path in folder.rglob(pattern):
            if path.relative_to(folder) not in fresh:
                path.unlink()


def _write(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _protoc(sources: list[str], descriptors: Path, out: Path, *, grpc: bool) -> None:
    arguments = [f"--python_out={out}", f"--mypy_out=quiet:{out}"]
    if grpc:
        arguments += [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
    _run_protoc([*arguments, *sources], descriptors)


def _descriptor_set(sources: list[str], descriptors: Path, out: Path) -> None:
    _run_protoc([f"--descriptor_set_out={out}", "--include_imports", "--include_source_info", *sources], descriptors)


def _run_protoc(arguments: list[str], descriptors: Path) -> None:
    from grpc_tools import protoc  # noqa: PLC0415  the build environment has it, a user of this module may not

    includes = [
        f"-I{PROTOS}",
        f"-I{descriptors.parent / 'include'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"-I{Path(distribution('googleapis-common-protos').locate_file(''))}",
    ]
    plugins = [f"--plugin=protoc-gen-{name}={_plugin(name)}" for name in ("mypy", "mypy_grpc")]
    code = protoc.main(["protoc", *includes, *plugins, f"--descriptor_set_in={descriptors}", *arguments])
    if code:
        raise RuntimeError(f"protoc ended with {code}")


def _plugin(name: str) -> str:
    """Path of a protoc plugin beside this interpreter, wherever the environment put it."""
    program = f"protoc-gen-{name}"
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.exists() else shutil.which(program)
    if not found:
        raise RuntimeError(f"{program} is missing: install mypy-protobuf")
    return found


def _package_file(module_root: str, relative: str) -> Path:
    spec = importlib.util.find_spec(module_root)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{module_root} is missing from the build environment")
    for location in spec.submodule_search_locations:
        path = Path(location) / relative
        if path.exists():
            return path
    raise RuntimeError(f"{relative} is missing from {module_root}")


def _serialized_file(source: Path, function: str) -> bytes:
    """The bytes literal that generated code hands to `function`, read without importing the module."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            callee = node.func
            name = callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", "")
            if name == function and isinstance(node.args[0].value, bytes):
                return node.args[0].value
    raise RuntimeError(f"no descriptor in {source}")


def _validate_descriptors() -> descriptor_pb2.FileDescriptorSet:
    source = _package_file("protovalidate", "_gen/buf/validate/validate_pb.py")
    result = descriptor_pb2.FileDescriptorSet()
    for module in ("descriptor", "duration", "field_mask", "timestamp"):
        _add_well_known(result, module)
    result.file.add().ParseFromString(_serialized_file(source, "file_desc"))
    return result


def _add_well_known(result: descriptor_pb2.FileDescriptorSet, module: str) -> None:
    imported = importlib.import_module(f"google.protobuf.{module}_pb2")
    imported.DESCRIPTOR.CopyToProto(result.file.add())


def _envoy_descriptors() -> descriptor_pb2.FileDescriptorSet:
    result = descriptor_pb2.FileDescriptorSet()
    seen: set[str] = set()

    def add(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        file = descriptor_pb2.FileDescriptorProto()
        if name.startswith("google/protobuf/"):
            module = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
            module.DESCRIPTOR.CopyToProto(file)
        else:
            root, relative = name.split("/", 1)
            source = _package_file(root, relative.removesuffix(".proto") + "_pb2.py")
            file.ParseFromString(_serialized_file(source, "AddSerializedFile"))
        for dependency in file.dependency:
            add(dependency)
        result.file.append(file)

    for name in ENVOY_ROOTS:
        add(name)
    return result


def _privatise(folder: Path) -> None:
    """Make generated modules of `folder` register in a pool of their own instead of the process-wide default."""
    (folder / "_pool.py").write_text(
        '"""The descriptor pool of the Open Inference Protocol, apart from the process-wide default pool."""\n\n'
        "from google.protobuf.descriptor_pool import DescriptorPool\n\n"
        "POOL = DescriptorPool()\n"
    )
    for path in folder.rglob("*_pb2.py"):
        text = path.read_text()
        changed = text.replace("_descriptor_pool.Default()", "_private_pool.POOL").replace(
            "from google.protobuf import descriptor_pool as _descriptor_pool",
            "from open_inference import _pool as _private_pool",
        )
        if changed == text:
            raise RuntimeError(f"{path} no longer registers the way this generator knows")
        path.write_text(changed)


def _packages(folder: Path) -> None:
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir() and p.name != "__pycache__")]:
        (directory / "__init__.py").touch()
    (folder / "py.typed").touch()


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a command
    pass
else:

    class GenerateStubs(BuildHookInterface[Any]):
        """Generates the stubs before a wheel, an sdist or an editable install is made."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
            generate()


if __name__ == "__main__":
    generate()
