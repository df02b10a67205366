"""A Kubernetes API server for TrainJobs, and what a cluster would do with them.

The API server is Kubernetes' own for custom resources (`make tools`), with Kubeflow Trainer's own schemas, on a real
etcd. What a cluster has beside it (the Trainer's controller, Jobs, kubelets) is played by `Nodes`: pods are local
processes with disks of their own, conditions are set in the order in which the controller sets them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support import tools

NAMESPACE = "mlmesh"
START_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass(kw_only=True)
class ApiServer:
    """A running API server: its URL, and a kubeconfig for clients."""

    url: str
    kubeconfig: Path
    certificate: Path
    _context: ssl.SSLContext = field(init=False)

    def __post_init__(self) -> None:
        self._context = ssl.create_default_context(cafile=str(self.certificate))

    def call(self, method: str, path: str, body: object = None, kind: str = "application/json") -> dict[str, Any]:
        """One request. Errors: urllib.error.HTTPError."""
        request = urllib.request.Request(f"{self.url}{path}", method=method)  # noqa: S310
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("content-type", kind)
        with urllib.request.urlopen(request, context=self._context, timeout=10) as reply:  # noqa: S310
            answer: dict[str, Any] = json.load(reply)
            return answer

    @property
    def jobs(self) -> str:
        """Path of the TrainJobs."""
        return f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"

    def train_jobs(self) -> list[dict[str, Any]]:
        """All TrainJobs."""
        items: list[dict[str, Any]] = self.call("GET", self.jobs)["items"]
        return items


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """An API server that knows TrainJobs; skips the test where a program is missing."""
    etcd, server, schemas = tools.require("etcd"), tools.require("crdserver"), tools.require("trainer_crds")
    client, peer, port = free_port(), free_port(), free_port()
    with contextlib.ExitStack() as stack:
        urls = {"client": f"http://127.0.0.1:{client}", "peer": f"http://127.0.0.1:{peer}"}
        arguments = [f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync", f"--initial-cluster=default={urls['peer']}"]
        arguments += [f"--listen-client-urls={urls['client']}", f"--advertise-client-urls={urls['client']}"]
        arguments += [f"--listen-peer-urls={urls['peer']}", f"--initial-advertise-peer-urls={urls['peer']}"]
        stack.enter_context(_running([str(etcd), *arguments], folder / "etcd.log"))
        command = [str(server), "-etcd", urls["client"], "-listen", f"127.0.0.1:{port}", "-folder", str(folder)]
        process = stack.enter_context(_running(command, folder / "crdserver.log"))
        certificate = folder / "apiserver.crt"
        _until(certificate.exists, process)
        kubeconfig = folder / "kubeconfig.yaml"
        url = f"https://127.0.0.1:{port}"
        kubeconfig.write_text(yaml.safe_dump(_kubeconfig(url, certificate)))
        api = ApiServer(url=url, kubeconfig=kubeconfig, certificate=certificate)
        definition = yaml.safe_load((schemas / "trainer.kubeflow.org_trainjobs.yaml").read_text())
        _until(lambda: _answers(lambda: api.call("GET", "/apis/apiextensions.k8s.io/v1")), process)
        api.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        _until(lambda: _answers(api.train_jobs), process)
        yield api


def _kubeconfig(url: str, certificate: Path) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(certificate)}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
        "users": [{"name": "test", "user": {}}],
    }


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _until(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, "it did not start in time"
        time.sleep(0.05)


def _answers(call: Any) -> bool:
    try:
        call()
    except (urllib.error.URLError, OSError):
        return False
    return True


class Nodes:
    """Runs TrainJobs as a cluster would. A context manager; at its end no pod is left.

    Args:
        environ: added to every pod's environment.
    """

    def __init__(self, api: ApiServer, *, environ: Mapping[str, str]) -> None:
        self._api = api
        self._environ = dict(environ)
        self._pods: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nodes")
        self._disks = Path(tempfile.mkdtemp(prefix="pods-"))
        self.started: list[tuple[str, int]] = []
        self.logs = self._disks / "logs"
        self.logs.mkdir()

    def __enter__(self) -> Nodes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        for name in list(self._pods):
            self._end(name, signal.SIGKILL)
        for log in sorted(self.logs.iterdir()):
            # Shown by pytest where the test fails.
            sys.stderr.write(f"--- pod {log.stem}\n{log.read_text()[-4000:]}\n")
        shutil.rmtree(self._disks, ignore_errors=True)

    def pids(self, name: str) -> list[int]:
        """Process ids of a TrainJob's pods that run."""
        return [pod.pid for pod in self._pods.get(name, ()) if pod.poll() is None]

    def _run(self) -> None:
        while not self._closing.wait(0.05):
            with contextlib.suppress(urllib.error.HTTPError):
                found = {job["metadata"]["name"]: job for job in self._api.train_jobs()}
                for name in set(self._pods) - set(found):
                    self._end(name, signal.SIGKILL)
                for name, job in found.items():
                    self._reconcile(name, job)

    def _reconcile(self, name: str, job: dict[str, Any]) -> None:
        if job["metadata"].get("deletionTimestamp"):
            self._end(name, signal.SIGTERM)
            self._patch(name, {"metadata": {"finalizers": None}}, status=False)
            return
        conditions = {each["type"]: each["status"] for each in job.get("status", {}).get("conditions", ())}
        if "True" in {conditions.get("Complete"), conditions.get("Failed")}:
            return
        if job["spec"].get("suspend"):
            if name in self._pods or conditions.get("Suspended") != "True":
                # As the controller does: it says so as soon as it was asked, then the pods go.
                self._status(name, job, Suspended=("True", "Suspended"), active=len(self.pids(name)))
                self._end(name, signal.SIGTERM)
                self._status(name, job, Suspended=("True", "Suspended"), suspended=1)
        elif name not in self._pods:
            self._start(name, job["spec"]["trainer"])
            resumed = {"Suspended": ("False", "Resumed")} if "Suspended" in conditions else {}
            self._status(name, job, active=1, ready=1, **resumed)
        else:
            codes = [pod.poll() for pod in self._pods[name]]
            if any(codes):
                self._end(name, signal.SIGKILL)
                self._status(name, job, Failed=("True", "FailedJobs"), failed=1)
            elif all(code == 0 for code in codes):
                self._status(name, job, Complete=("True", "AllJobsCompleted"), succeeded=1)

    def _start(self, name: str, trainer: dict[str, Any]) -> None:
        nodes, processes = trainer["numNodes"], trainer["numProcPerNode"]
        given = {each["name"]: each["value"] for each in trainer["env"]}
        rendezvous = {
            "PET_NNODES": str(nodes),
            "PET_NPROC_PER_NODE": str(processes),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(free_port()),
        }
        pods = self._pods[name] = []
        for rank in range(nodes):
            number = len(self.started)
            disk = self._disks / f"pod-{number}"
            disk.mkdir()
            environ = {**os.environ, **self._environ, **given, **rendezvous, "PET_NODE_RANK": str(rank)}
            environ["MLMESH_DATA_DIR"] = str(disk)
            command = [sys.executable if part == "python" else part for part in trainer["command"]]
            with (self.logs / f"{number}.log").open("wb") as log:
                pods.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True))
            self.started.append((name, rank))

    def _end(self, name: str, number: signal.Signals) -> None:
        pods = self._pods.pop(name, [])
        for pod in pods:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pod.pid, number)
        for pod in pods:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pod.wait(20)
            # A pod's end is the end of all its processes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.pid, signal.SIGKILL)
            pod.wait()

    def _status(self, name: str, job: dict[str, Any], **now: Any) -> None:
        conditions = {each["type"]: each for each in job.get("status", {}).get("conditions", ())}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for kind in ("Suspended", "Complete", "Failed"):
            if kind in now:
                status, reason = now.pop(kind)
                message = f"TrainJob is {reason}"
                conditions[kind] = {"type": kind, "status": status, "reason": reason, "message": message}
                conditions[kind]["lastTransitionTime"] = stamp
        job.setdefault("status", {})["conditions"] = list(conditions.values())
        child = {"name": "node", "active": 0, "ready": 0, "failed": 0, "succeeded": 0, "suspended": 0, **now}
        self._patch(name, {"status": {"conditions": list(conditions.values()), "jobsStatus": [child]}}, status=True)

    def _patch(self, name: str, patch: dict[str, Any], *, status: bool) -> None:
        path = f"{self._api.jobs}/{name}{'/status' if status else ''}"
        with contextlib.suppress(urllib.error.HTTPError):
            self._api.call("PATCH", path, patch, "application/merge-patch+json")
