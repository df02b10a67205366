"""How each server is started, each in an environment of its own, and asked whether it is ready.

A server is a process tree on loopback that serves both models; `Started` says how to reach it and what to count.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import psutil

from benchmarks.peers import models
from mlmesh_cli.tensors import infer_request
from open_inference import grpc_service_pb2 as oip
from open_inference import grpc_service_pb2_grpc

ROOT: Final = Path(__file__).resolve().parents[2]
HERE: Final = Path(__file__).resolve().parent
BUILD: Final = ROOT / "build" / "peers"
OIP_PATH: Final = "/inference.GRPCInferenceService/ModelInfer"
TORCHSERVE_PATH: Final = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
START_S: Final = 60.0


class Unavailable(Exception):  # noqa: N818  named by what is wrong
    """A server cannot be measured here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A server that answers.

    Attributes:
        name: as the table shows it. address: host:port of its gRPC (or, without gRPC, HTTP) port.
        pids: of its root processes. protocol: "oip", "torchserve" or "http".
        streams: whether it has ModelStreamInfer. spins: whether it is busy while it waits, and so must stop meanwhile.
        note: what a reader of the table must know.
    """

    name: str
    address: str
    pids: Sequence[int]
    protocol: str = "oip"
    streams: bool = False
    spins: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server that can be started: `start` yields it and ends it with the block."""

    name: str
    start: Callable[[Path, Mapping[str, Path]], contextlib.AbstractContextManager[Started]]
    requirements: str = ""
    sessions: Mapping[str, int] = field(default_factory=dict)


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(requirements: str) -> Path:
    """Python of the environment of one peer, made when it is not there. Raises Unavailable."""
    folder = BUILD / "environments" / requirements
    python = folder / "bin" / "python"
    listed = HERE / "requirements" / f"{requirements}.txt"
    wanted = listed.read_text()
    done = folder / "installed.txt"
    if done.exists() and done.read_text() == wanted:
        return python
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    commands = [
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            str(python),
            "-r",
            str(HERE / "requirements" / f"{requirements}.txt"),
        ],
    ]
    for command in commands:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise Unavailable(f"its environment cannot be made: {ended.stderr.strip()[-300:]}")
    done.write_text(wanted)
    return python


@contextlib.contextmanager
def process(
    command: Sequence[str], *, log: Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process in a group of its own, ended with the block, children included."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            list(command),
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environ or {})},
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        end_group(started)


def end_group(started: subprocess.Popen[bytes], *, grace_s: float = 10.0) -> None:
    """Ask the process's own group to end; then make it."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(started.pid)
        family = [root, *root.children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGTERM)
        os.killpg(started.pid, signal.SIGCONT)
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    started.wait()


def halt(started: Started, *, go_on: bool) -> None:
    """Stop a server's processes, or let them go on: some are busy while nobody asks them anything."""
    for pid in started.pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGCONT if go_on else signal.SIGSTOP)


def await_ready(check: Callable[[], bool], started: subprocess.Popen[bytes], log: Path) -> None:
    """Until `check` says so. Raises Unavailable with the log's end when the process ends or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if started.poll() is not None:
            break
        with contextlib.suppress(grpc.RpcError, OSError):
            if check():
                return
        time.sleep(0.2)
    raise Unavailable(f"it did not get ready: {log.read_text(errors='replace')[-600:]}")


def oip_ready(address: str, wanted: Sequence[str] = (models.TINY, models.MINILM)) -> bool:
    """Whether the models answer a real request."""
    with grpc.insecure_channel(address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for model in wanted:
            answer: oip.ModelInferResponse = stub.ModelInfer(infer_request(model, models.inputs(model)), timeout=10)
            if not answer.outputs:
                return False
    return True


# --- the peers -----------------------------------------------------------------------------------------------------


def _serve_environ(sessions: int) -> dict[str, str]:
    return {
        "BENCH_FOLDER": str(HERE),
        "PYTHONPATH": str(HERE),
        "BENCH_SESSIONS": str(sessions),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def triton(folder: Path, files: Mapping[str, Path]) -> Iterator[Started]:
    """Triton's binary; two instances a model, dynamic batching of up to 8 rows."""
    python = environment("triton")
    server = next((python.parent.parent / "lib").glob("python*/site-packages/pytriton/tritonserver"))
    backends = folder / "backends"
    shutil.copytree(server / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    for name, path in files.items():
        (folder / "models" / name / "1").mkdir(parents=True)
        shutil.copy(HERE / "serve" / "triton_model.py", folder / "models" / name / "1" / "model.py")
        (folder / "models" / name / "config.pbtxt").write_text(_triton_config(name, path))
    grpc_port, http_port, metrics_port = free_port(), free_port(), free_port()
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={backends}",
        f"--grpc-port={grpc_port}",
        "--grpc-address=127.0.0.1",
        f"--http-port={http_port}",
        "--http-address=127.0.0.1",
        f"--metrics-port={metrics_port}",
        "--metrics-address=127.0.0.1",
        "--log-info=false",
    ]
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    environ = {
        **_serve_environ(1),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{site}:{HERE}",
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{_libraries(python)}",
    }
    log, address = folder / "log", f"127.0.0.1:{grpc_port}"
    with process(command, log=log, environ=environ) as started:
        await_ready(lambda: oip_ready(address), started, log)
        note = "2.51, Python backend, two instances, preferred batch 8, no queue delay"
        yield Started(name="Triton", address=address, pids=[started.pid], streams=True, note=note)


def _libraries(python: Path) -> str:
    """Where the interpreter's shared library lies: the backend's stub is linked against it."""
    done = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _triton_config(name: str, path: Path) -> str:
    if name == models.TINY:
        tensors = f'input [{{ name: "x" data_type: TYPE_FP32 dims: [{models.FEATURES}] }}]\n'
        tensors += f'output [{{ name: "y" data_type: TYPE_FP32 dims: [{models.CLASSES}] }}]\n'
    else:
        tensors = 'input [{ name: "input_ids" data_type: TYPE_INT64 dims: [-1] },\n'
        tensors += '  { name: "attention_mask" data_type: TYPE_INT64 dims: [-1] }]\n'
        tensors += f'output [{{ name: "sentence_embedding" data_type: TYPE_FP32 dims: [{models.HIDDEN}] }}]\n'
    return (
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 8\n{tensors}'
        "dynamic_batching { preferred_batch_size: [8] }\n"
        "instance_group [{ count: 2 kind: KIND_CPU }]\n"
        f'parameters {{ key: "folder" value {{ string_value: "{HERE}" }} }}\n'
        f'parameters {{ key: "path" value {{ string_value: "{path}" }} }}\n'
    )


@contextlib.contextmanager
def kserve(folder: Path, files: Mapping[str, Path]) -> Iterator[Started]:
    """KServe's Python server, one worker."""
    python = environment("kserve")
    port = free_port()
    environ = {**_serve_environ(2), "BENCH_GRPC_PORT": str(port), "BENCH_HTTP_PORT": str(free_port())}
    arguments = [f"{name}={path}" for name, path in files.items()]
    log, address = folder / "log", f"127.0.0.1:{port}"
    with process(
        [str(python), str(HERE / "serve" / "kserve_server.py"), *arguments], log=log, environ=environ
    ) as started:
        await_ready(lambda: oip_ready(address), started, log)
        yield Started(name="KServe", address=address, pids=[started.pid], note="0.21, Python server, no batching")


@contextlib.contextmanager
def mlserver(folder: Path, files: Mapping[str, Path]) -> Iterator[Started]:
    """MLServer in one process, adaptive batching of 8."""
    python = environment("mlserver")
    port = free_port()
    (folder / "settings.json").write_text(
        json.dumps(
            {
                "parallel_workers": 0,
                "grpc_port": port,
                "http_port": free_port(),
                "metrics_port": free_port(),
                "host": "127.0.0.1",
                "logging_settings": None,
                "debug": False,
            }
        )
    )
    for name, path in files.items():
        (folder / name).mkdir()
        settings = {"name": name, "implementation": "mlserver_runtime.OnnxRuntime", "parameters": {"uri": str(path)}}
        if name == models.MINILM:
            settings |= {"max_batch_size": 8, "max_batch_time": 0.001}
        (folder / name / "model-settings.json").write_text(json.dumps(settings))
    environ = {**_serve_environ(2), "PYTHONPATH": f"{HERE}:{HERE / 'serve'}"}
    log, address = folder / "log", f"127.0.0.1:{port}"
    command = [str(python.with_name("mlserver")), "start", str(folder)]
    with process(command, log=log, environ=environ, cwd=folder) as started:
        await_ready(lambda: oip_ready(address), started, log)
        note = "1.7.1, in process; MiniLM with adaptive batching of 8"
        yield Started(name="MLServer", address=address, pids=[started.pid], note=note)


@contextlib.contextmanager
def torchserve(folder: Path, files: Mapping[str, Path]) -> Iterator[Started]:
    """TorchServe with two workers a model, batches of 8. Needs Java."""
    if shutil.which("java") is None:
        raise Unavailable("there is no Java runtime")
    python = environment("torchserve")
    store = folder / "store"
    store.mkdir()
    for name in files:
        subprocess.run(
            [
                str(python.with_name("torch-model-archiver")),
                "--model-name", name, "--version", "1.0", "--export-path", str(store),
                "--handler", str(HERE / "serve" / "torchserve_handler.py"), "--force",
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
    port, ports = free_port(), [free_port() for _ in range(4)]
    snapshot = {
        name: {"1.0": {"marName": f"{name}.mar", "minWorkers": 2, "maxWorkers": 2, "batchSize": 8, "maxBatchDelay": 1,
                       "responseTimeout": 60, "defaultVersion": True}}
        for name in files
    }  # fmt: skip
    lines = [
        f"inference_address=http://127.0.0.1:{ports[0]}",
        f"management_address=http://127.0.0.1:{ports[1]}",
        f"metrics_address=http://127.0.0.1:{ports[2]}",
        f"grpc_inference_port={port}",
        f"grpc_management_port={ports[3]}",
        f"model_store={store}",
        "disable_token_authorization=true",
        "job_queue_size=1000",
        f"model_snapshot={json.dumps({'name': 'startup.cfg', 'modelCount': len(files), 'models': snapshot})}",
        "load_models=" + ",".join(f"{name}.mar" for name in files),
    ]
    (folder / "config.properties").write_text("\n".join(lines) + "\n")
    models_folder = next(iter(files.values())).parent
    environ = {
        **_serve_environ(1),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "BENCH_MODELS": str(models_folder),
        "LOG_LOCATION": str(folder / "logs"),
        "METRICS_LOCATION": str(folder / "logs"),
    }
    command = [str(python.with_name("torchserve")), "--start", "--foreground", "--ts-config",
               str(folder / "config.properties"), "--model-store", str(store), "--disable-token-auth"]  # fmt: skip
    log, address = folder / "log", f"127.0.0.1:{port}"
    with process(command, log=log, environ=environ, cwd=folder) as started:
        await_ready(lambda: torchserve_ready(address), started, log)
        note = "0.12, raw bodies over its own API, two workers, batches of 8"
        yield Started(name="TorchServe", address=address, pids=[started.pid], protocol="torchserve", note=note)


def torchserve_request(model: str) -> bytes:
    """PredictionsRequest{model_name=1, input=3 map<string,bytes>}, written out: its stubs are in no wheel."""
    body = b"".join(array.tobytes() for _, _, array in models.inputs(model))
    entry = _field(1, b"data") + _field(2, body)
    return _field(1, model.encode()) + _field(3, entry)


def _field(number: int, value: bytes) -> bytes:
    size, length = len(value), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + value


def torchserve_ready(address: str) -> bool:
    """Whether both models answer."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(TORCHSERVE_PATH, request_serializer=None, response_deserializer=None)
        return all(
            len(call(torchserve_request(model), timeout=10)) >= models.output_bytes(model)
            for model in (models.TINY, models.MINILM)
        )


@contextlib.contextmanager
def litserve(folder: Path, files: Mapping[str, Path]) -> Iterator[Started]:
    """LitServe, two workers, over HTTP and JSON; one server a model, so only MiniLM's and the tiny one's in turn."""
    python = environment("litserve")
    with contextlib.ExitStack() as stack:
        ports = {name: free_port() for name in files}
        pids = []
        for name, path in files.items():
            log = folder / f"{name}.log"
            environ = {**_serve_environ(1), "BENCH_HTTP_PORT": str(ports[name])}
            command = [str(python), str(HERE / "serve" / "litserve_server.py"), f"{name}={path}"]
            started = stack.enter_context(process(command, log=log, environ=environ))
            await_ready(lambda port=ports[name], model=name: _http_ready(port, model), started, log)  # type: ignore[misc]
            pids.append(started.pid)
        addresses = ",".join(f"{name}=127.0.0.1:{port}" for name, port in ports.items())
        note = "0.2.19, HTTP and JSON (it has no gRPC), two workers, batches of 8"
        yield Started(name="LitServe", address=addresses, pids=pids, protocol="http", spins=True, note=note)


def http_request(model: str) -> bytes:
    """JSON of the same tensors."""
    return json.dumps({name: array[0].tolist() for name, _, array in models.inputs(model)}).encode()


def _http_ready(port: int, model: str) -> bool:
    import urllib.request

    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", http_request(model), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return bool(json.load(answer)["y"])


PEERS: Final = (
    Peer(name="triton", start=triton),
    Peer(name="kserve", start=kserve),
    Peer(name="mlserver", start=mlserver),
    Peer(name="torchserve", start=torchserve),
    Peer(name="litserve", start=litserve),
)
