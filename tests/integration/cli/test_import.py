"""`mlmesh models import`: versions of a real MLflow server become versions of a real registry."""

from __future__ import annotations

import http.client
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from mlmesh_cli.app import app
from tests.support.mlflow import Mlflow, mlflow_running
from tests.support.registry_process import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    """A server with an ONNX model of two versions, a pickle, a folder of tensors, and a big file."""
    with mlflow_running(tmp_path_factory.mktemp("mlflow")) as server:
        server.log("onnx", "pickle", "tensors", "big")
        yield server


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("registry")) as (_, address):
        yield address


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `mlmesh` with a registry and an MLflow server."""

    registry: str
    url: str

    def run(self, *arguments: str, code: int = 0, **env: str) -> Any:
        variables = {"MLMESH_REGISTRY_TARGET": self.registry, "MLFLOW_TRACKING_URI": self.url, **env}
        result = CliRunner().invoke(app, ["models", *arguments], env=variables)
        assert result.exit_code == code, (arguments, result.stdout, result.stderr, result.exception)
        return result

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "-o", "json").stdout)


@pytest.fixture
def shell(registry: str, mlflow: Mlflow) -> Shell:
    return Shell(registry, mlflow.url)


def test_a_version_comes_with_all_that_is_known_of_it(shell: Shell, mlflow: Mlflow, tmp_path: Path) -> None:
    planned = shell.json("import", "My Digits/1", "--dry-run")
    assert planned["dry_run"]
    assert shell.run("show", "my-digits", code=1).stderr.startswith("error: NOT_FOUND"), "nothing was made"
    told = shell.run("import", "My Digits@Champion", "-o", "json")
    made = json.loads(told.stdout)
    assert made["name"] == "models/my-digits/versions/1"
    assert made["metrics"] == {"accuracy": 0.9, "loss": 2.0}
    assert made["labels"]["stage"] == 'it\'s "good" * 100 %'
    assert made["labels"].keys() == {"stage", "mlflow.run_id"}
    assert made["description"] == "the first one"
    assert made["aliases"] == ["models/my-digits/aliases/champion"]
    assert made["lineage"]["source_uri"] == f"{mlflow.url}/#/models/My%20Digits/versions/1"
    assert [(t["name"], t["datatype"], t["shape"]) for t in made["signature"]["inputs"]] == [("x", "FP32", ["-1", "4"])]
    assert [(t["name"], t["datatype"], t["shape"]) for t in made["signature"]["outputs"]] == [
        ("y", "FP32", ["-1", "2"])
    ]
    assert {a["path"] for a in made["artifacts"]} == {"MLmodel", "model.onnx", "requirements.txt"}
    for left in ("conda.yaml: not ONNX", "metric 'broken': nan", "alias '12': makes no alias"):
        assert left in told.stderr
    model = shell.json("show", "my-digits")["model"]
    assert (model["description"], model["labels"]) == ("digits of all kinds", {"team": "vision"})
    # The bytes are those that MLflow has.
    shell.run("download", "my-digits/1", "--to", str(tmp_path))
    (stored,) = [
        path
        for path in mlflow.folder.rglob("model.onnx")
        if path.read_bytes() == (tmp_path / "model.onnx").read_bytes()
    ]
    assert stored.is_relative_to(mlflow.folder / "files")


def test_importing_again_gives_the_same_version(shell: Shell) -> None:
    first = shell.json("import", "My Digits/2", "--as", "again")
    assert first["name"] == "models/again/versions/1"
    assert shell.json("import", "My Digits/2", "--as", "again")["name"] == first["name"]
    assert "imported before" in shell.run("import", "models:/My Digits/2", "--as", "again").stdout
    assert shell.json("import", "My Digits/1", "--as", "again")["name"] == "models/again/versions/2"
    assert len(shell.json("versions", "again")["model_versions"]) == 2


def test_pickles_are_refused_by_name(shell: Shell) -> None:
    refused = shell.run("import", "pickled/1", code=1)
    assert "model.pkl would run whatever is in it" in refused.stderr
    assert "mlflow.onnx.log_model" in refused.stderr
    assert shell.run("show", "pickled", code=1)


def test_tensors_come_without_what_unpickles(shell: Shell) -> None:
    told = shell.run("import", "encoder/1", "-o", "json")
    made = json.loads(told.stdout)
    assert {a["path"] for a in made["artifacts"]} == {"MLmodel", "model/config.json", "model/model.safetensors"}
    assert "training_args.bin: a pickle" in told.stderr
    assert [(t["name"], t["datatype"]) for t in made["signature"]["inputs"]] == [("text", "BYTES")]
    assert [(t["name"], t["datatype"]) for t in made["signature"]["outputs"]] == [("score", "FP64")]


def test_what_is_not_there_is_named(shell: Shell) -> None:
    assert "not found" in shell.run("import", "My Digits/99", code=1).stderr
    assert shell.run("import", "My Digits@nobody", code=1).stderr
    assert "NAME/VERSION" in shell.run("import", "My Digits", code=2).stderr
    assert "does not answer" in shell.run("import", "x/1", "--mlflow", "http://127.0.0.1:9", code=1).stderr
    for wrong in ("file:///etc", "http://user:secret@127.0.0.1:5000", "ftp://x"):
        refused = shell.run("import", "x/1", "--mlflow", wrong, code=2)
        assert "no address" in refused.stderr
        assert "secret" not in refused.stderr
    assert "does not answer like an MLflow server" in _beside(shell)


def _beside(shell: Shell) -> str:
    """What is said of a server that answers, but not as MLflow does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            return str(shell.run("import", "x/1", "--mlflow", url, code=1).stderr)
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Cutter:
    """Between the command and MLflow: wants a token, and cuts the big file once."""

    target: str
    token: str
    ranges: bool = True
    cuts: int = 1
    seen: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> str:
        cutter = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                cutter.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """Pass a request on, or cut its answer."""
        if handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.send_response(401)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        wanted = handler.headers.get("Range", "")
        self.seen.append((handler.path, wanted))
        host = urllib.parse.urlsplit(self.target).netloc
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", handler.path, headers={"Range": wanted} if wanted and self.ranges else {})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        handler.send_response(answer.status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if len(body) > 1 << 22 and self.cuts:
            self.cuts -= 1
            handler.wfile.write(body[: len(body) // 3])
            handler.close_connection = True
            return
        handler.wfile.write(body)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_cut_download_goes_on_and_the_token_is_sent(shell: Shell, tmp_path: Path, ranges: bool) -> None:
    cutter = Cutter(shell.url, "hunter-2", ranges=ranges)
    with cutter as url:
        refused = shell.run("import", "big/1", "--mlflow", url, code=1)
        assert "HTTP 401" in refused.stderr
        assert "--token-variable" in refused.stderr
        arguments = (
            "import",
            "big/1",
            "--mlflow",
            url,
            "--as",
            f"big-{ranges}".lower(),
            "--token-variable",
            "MY_TOKEN",
        )
        made = shell.run(*arguments, "-o", "json", MY_TOKEN="hunter-2")
    sizes = {a["path"]: int(a["size_bytes"]) for a in json.loads(made.stdout)["artifacts"]}
    assert sizes["model.onnx"] > 24 << 20
    # MLflow keeps the tensors in a file of their own; that is the one that was cut.
    asked = [(path, wanted) for path, wanted in cutter.seen if wanted]
    assert len(asked) == 1
    assert asked[0][1].startswith("bytes=")
    shell.run("download", json.loads(made.stdout)["name"].replace("/versions", "")[7:], "--to", str(tmp_path))
    answer = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(
        None, {"x": np.zeros((1, 3 << 20), np.float32)}
    )
    assert answer[0].tolist() == [[0, 0]]
    assert "hunter-2" not in made.stdout + made.stderr
