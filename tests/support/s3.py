"""A real S3 server for tests: OpenStack Swift, in an environment of its own that `make tools` makes."""

from __future__ import annotations

import datetime
import itertools
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import obstore
import pytest

from mlmesh_registry.objects import open_store
from tests.support.tools import ROOT

PYTHON = ROOT / ".tools" / "swift" / "bin" / "python"
SCRIPT = Path(__file__).with_name("swift_server.py")


class S3Server:
    """Swift's S3 API on a loopback port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._buckets = itertools.count()
        self.env: Mapping[str, str] = {}
        self.start()

    def start(self) -> None:
        """Serve; where it served before, when it did."""
        self._process = subprocess.Popen(
            [str(PYTHON), "-W", "ignore", str(SCRIPT), str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        address = self._process.stdout.readline().strip()
        assert address, "Swift did not start"
        self.env = {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test:tester",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }

    def stop(self) -> None:
        """Stop at once; what is stored stays."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate(timeout=20)

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    def bucket(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """Make a bucket and let this process speak to the server; a URL in the bucket."""
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)
        name = f"bucket-{next(self._buckets)}"
        self.make(name)
        return f"s3://{name}/prefix"

    def make(self, name: str) -> None:
        """Make a bucket. The variables of `env` must be set."""
        url = obstore.sign(open_store(f"s3://{name}", "test"), "PUT", "", datetime.timedelta(minutes=1))
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT", data=b""), timeout=20) as made:  # noqa: S310
            assert made.status == 200


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server, one for all tests; skips where it is not installed."""
    if not PYTHON.exists():
        pytest.skip("OpenStack Swift is not here: `make tools` installs it")
    server = S3Server(tmp_path_factory.mktemp("swift"))
    try:
        yield server
    finally:
        server.stop()
