"""The whole demo with real processes and real Envoys; then every command against the mesh that it leaves running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

MLMESH = str(Path(sys.executable).with_name("mlmesh"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """Runs `mlmesh` in a folder."""

    folder: Path

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command for the length of a block, ended with it; its output is read by the caller."""
        with subprocess.Popen(
            [MLMESH, *arguments],
            cwd=self.folder,
            env={**os.environ, "COLUMNS": "160"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *arguments: str, timeout_s: float = 120, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command that must exit with this code."""
        done = subprocess.run(
            [MLMESH, *arguments],
            cwd=self.folder,
            env={**os.environ, "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.run(*arguments, "-o", "json").stdout)

    def processes(self) -> list[psutil.Process]:
        """What runs for this folder: the supervisor, its applications and Envoys."""
        found = []
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                if str(self.folder) in words or process.cwd().startswith(str(self.folder)):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C; the command must end with 130 and without a traceback. Gives what it said on standard error."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, dict[str, Any]]]:
    """The fast story told once; its mesh stays up for the module."""
    shell = Shell(folder=tmp_path_factory.mktemp("story"))
    try:
        done = shell.run("demo", "--fast", "--keep", "--state-dir", ".mlmesh", "-o", "json", timeout_s=400)
        yield shell, json.loads(done.stdout)
    finally:
        subprocess.run([MLMESH, "down"], cwd=shell.folder, timeout=120, check=True, capture_output=True)
        left = psutil.wait_procs(shell.processes(), timeout=10)[1]
        assert not left, f"left running: {left}"


@pytest.fixture
def shell(told: tuple[Shell, dict[str, Any]]) -> Shell:
    """A folder with a running mesh and a model `digits` of two versions."""
    return told[0]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_claim_of_the_story_holds(told: tuple[Shell, dict[str, Any]]) -> None:
    _, report = told
    assert report["held"]
    claims = " | ".join(check["claim"] for check in report["checks"])
    parts = ("no request failed", "share", "outlived", "follow the weights", "answered twice", "x-user", "killed")
    for part in (*parts, "not retried", "certificate", "trace"):
        assert part in claims


@pytest.mark.slow
def test_status_knows_every_process(shell: Shell) -> None:
    status = shell.json("status")
    assert status["ready"]
    by_name = {i["name"]: i for i in status["instances"]}
    assert set(by_name) == {
        "inference-v1-0",
        "inference-v1-1",
        "inference-v2-0",
        "ingressgateway-0",
        "registry-0",
        "toolbox-0",
        "training-0",
    }
    for instance in by_name.values():
        assert psutil.pid_exists(instance["sidecar_pid"])
        assert instance["acked_version"] == status["config_version"]
    assert by_name["inference-v1-0"]["restarts"] == 1, "the story kills it once"


@pytest.mark.slow
def test_a_second_up_says_that_one_is_running(shell: Shell) -> None:
    done = shell.run("up", "--gateway-address", "none", code=1)
    assert "a mesh already runs" in done.stderr
    assert "mlmesh down" in done.stderr
    assert shell.json("status")["ready"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--stream"]], ids=["unary", "stream"])
def test_infer_in_both_ways(shell: Shell, way: list[str]) -> None:
    done = shell.run("infer", "digits", "--count", "50", "-c", "8", "-o", "json", *way)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 50
    assert {answer["version"] for answer in answers} == {"1"}
    assert not [answer for answer in answers if answer["error"]]


@pytest.mark.slow
def test_what_does_not_exist_is_named(shell: Shell) -> None:
    assert "NOT_FOUND" in shell.run("infer", "nothing", code=1).stderr
    assert "mlmesh train list" in shell.run("train", "watch", "none", code=1).stderr
    assert "mlmesh train recipes" in shell.run("train", "-r", "magic", code=1).stderr
    assert "epochs" in shell.run("train", "--set", "epochs=0", code=1).stderr


@pytest.mark.slow
def test_a_wrong_file_is_refused_with_line_and_field_and_changes_nothing(shell: Shell) -> None:
    before = shell.json("status")["config_version"]
    shell.run("init", "yaml")
    good = (shell.folder / "yaml/mesh/istio/virtualservice.yaml").read_text()
    line = good.splitlines().index("            subset: v2") + 1
    (shell.folder / "wrong.yaml").write_text(good.replace("subset: v2", "subset: v3"))
    done = shell.run("apply", "-f", "wrong.yaml", code=1)
    told = re.search(r"wrong\.yaml:(\d+): ", done.stderr)
    # The line of the field, or of the destination that it belongs to.
    assert told, done.stderr
    assert line - 2 <= int(told[1]) <= line
    assert "spec.http[0].route[1].destination.subset" in done.stderr
    (shell.folder / "wrong.yaml").write_text(good.replace("weight: 100", "weight: -1"))
    assert "weight" in shell.run("apply", "wrong.yaml", code=1).stderr
    assert shell.json("status")["config_version"] == before


@pytest.mark.slow
def test_routes_show_the_weights_that_were_applied(shell: Shell) -> None:
    shell.run("init", "yaml", "--force")
    path = shell.folder / "yaml/mesh/istio/virtualservice.yaml"
    path.write_text(path.read_text().replace("weight: 100", "weight: 70").replace("weight: 0", "weight: 30"))
    dry = shell.run("apply", "-f", str(path), "--dry-run").stdout
    assert "configured (dry run)" in dry
    assert "70.0 %" not in shell.run("routes", "inference").stdout
    applied = shell.json("apply", "-f", str(path))
    assert applied["acked_sidecars"] == applied["connected_sidecars"] == 7
    table = shell.run("routes", "inference").stdout
    assert "70.0 %" in table
    assert "30.0 %" in table
    path.write_text(path.read_text().replace("weight: 70", "weight: 100").replace("weight: 30", "weight: 0"))
    shell.run("apply", "-f", str(path))


@pytest.mark.slow
def test_models_go_round(shell: Shell) -> None:
    shell.run("models", "download", "digits@stable", "--to", "files")
    assert shell.run("models", "show", "digits@canary").stdout.count("FP32") >= 2
    published = shell.json(
        "models", "publish", "copy", "files/model.onnx", "--alias", "first", "--metric", "accuracy=0.5"
    )
    assert (published["name"], published["metrics"]["accuracy"]) == ("models/copy/versions/1", 0.5)
    shell.run("models", "download", "copy@first", "--to", "again")
    original, again = (shell.folder / folder / "model.onnx" for folder in ("files", "again"))
    assert original.read_bytes() == again.read_bytes()
    assert [alias["name"] for alias in shell.json("models", "alias", "list", "copy")["aliases"]] == [
        "models/copy/aliases/first"
    ]
    refused = shell.run("models", "alias", "set", "copy", "first", "1", "--etag", "old", code=1)
    assert "ABORTED" in refused.stderr
    assert [v["name"] for v in shell.json("models", "versions", "digits")["model_versions"]] == [
        "models/digits/versions/2",
        "models/digits/versions/1",
    ]


@pytest.mark.slow
def test_models_are_searched_promoted_and_audited_through_the_mesh(shell: Shell) -> None:
    found = shell.json("models", "versions", "--filter", "model = digits AND aliases:stable")["model_versions"]
    assert [version["name"] for version in found] == ["models/digits/versions/1"]
    assert shell.json("models", "promote", "digits", "candidate", "2", "--reason", "a try")["moved"]
    move = shell.json("models", "history", "digits@candidate")["moves"][0]
    assert move["actor"].startswith("spiffe://cluster.local/ns/mlmesh/sa/")
    assert shell.json("models", "verify", "digits/1")["corrupt_paths"] == []
    assert shell.json("quota", "show")["versions_used"] != "0"
    assert shell.json("audit", "verify")["intact"]
    shell.run("models", "alias", "delete", "digits", "candidate")


@pytest.mark.slow
def test_certificates_for_tools(shell: Shell) -> None:
    before = {c["instance"]: c["serial"] for c in shell.json("certs", "list")["certificates"]}
    assert shell.json("certs", "issue", "inference")["identity"] == "spiffe://cluster.local/ns/mlmesh/sa/inference"
    assert shell.json("certs", "rotate")["rotated"] == 7
    after = {c["instance"]: c["serial"] for c in shell.json("certs", "list")["certificates"]}
    assert not set(before.values()) & set(after.values())


@pytest.mark.slow
def test_ctrl_c_ends_a_watch_cleanly(shell: Shell) -> None:
    for command in (("status", "--watch"), ("routes", "--watch")):
        with shell.started(*command, "-o", "json") as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())
            interrupt(process)


@pytest.mark.slow
def test_ctrl_c_detaches_from_a_job_that_goes_on(shell: Shell) -> None:
    with shell.started("train", "-d", "digits", "--set", "epochs=500", "--no-publish", "-o", "json") as process:
        assert process.stdout is not None
        job = json.loads(process.stdout.readline())["job"]["name"]
        said = interrupt(process)
    assert f"mlmesh train watch {job}" in said
    assert shell.json("train", "list")["jobs"][0]["name"] == job
    shell.run("train", "cancel", job)
    assert "was cancelled" in shell.run("train", "watch", job, code=1).stderr


@pytest.mark.slow
def test_ctrl_c_while_the_mesh_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    shell = Shell(folder=tmp_path)
    with shell.started("up", "--gateway-address", "none") as process:
        # Something of it runs before it is interrupted: the supervisor writes its process id first.
        pid_file = tmp_path / ".mlmesh/supervisor.pid"
        while not (pid_file.exists() and pid_file.read_text().strip()):
            assert process.poll() is None, process.communicate()
        interrupt(process)
    assert not psutil.wait_procs(shell.processes(), timeout=10)[1]
    assert shell.run("status", code=3)


@pytest.mark.slow
def test_a_port_in_use_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    import socket

    shell = Shell(folder=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = shell.run("up", "--gateway-address", address, code=1)
    assert f"port {address.rpartition(':')[2]}" in done.stderr
    assert "--gateway-address" in done.stderr
    assert not psutil.wait_procs(shell.processes(), timeout=10)[1]
