"""`mlmesh config`: what sidecars were told, and what their Envoys say that they run."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import yaml

from mlmesh.local.v1 import local_pb2 as local
from mlmesh_local.live.running import Sent, compare, running
from tests.unit.cli.conftest import FakeMesh

CLUSTERS = "type.googleapis.com/envoy.admin.v3.ClustersConfigDump"
LISTENERS = "type.googleapis.com/envoy.admin.v3.ListenersConfigDump"
ENDPOINTS = "type.googleapis.com/envoy.admin.v3.EndpointsConfigDump"


def _endpoint(port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.64.1.1", "port_value": port}}
    return {"endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}


DUMP = {
    "configs": [
        {"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump"},
        {
            "@type": CLUSTERS,
            "dynamic_active_clusters": [
                {"version_info": "c1", "cluster": {"@type": "x", "name": "a", "type": "EDS"}},
                {"version_info": "c2", "cluster": {"name": "old", "type": "STATIC"}},
            ],
            "dynamic_warming_clusters": [{"version_info": "c3", "cluster": {"name": "b"}}],
        },
        {
            "@type": LISTENERS,
            "dynamic_listeners": [
                {
                    "name": "l",
                    "active_state": {"version_info": "l2", "listener": {"name": "l"}},
                    "draining_state": {"version_info": "l1", "listener": {"name": "l"}},
                },
                {"name": "bad", "error_state": {"version_info": "b1", "details": "no"}},
            ],
        },
        {
            "@type": ENDPOINTS,
            "dynamic_endpoint_configs": [
                {"endpoint_config": {"cluster_name": "a", **_endpoint(9000)}},
                {"endpoint_config": {"cluster_name": "old", **_endpoint(9000)}},
            ],
        },
    ]
}


def _sent(kind: str, name: str, version: str, **content: Any) -> Sent:
    return Sent(type=kind, name=name, version=version, content=content)


def test_both_sides_are_compared_by_version_and_endpoints_by_address() -> None:
    sent = [
        _sent("clusters", "a", "c1"),
        _sent("clusters", "b", "c3"),
        _sent("clusters", "c", "c4"),
        _sent("listeners", "l", "l3"),
        _sent("endpoints", "a", "e1", **_endpoint(9000)),
        Sent(type="extensions", name="f", version="f1", content={}, acked=False),
    ]
    found = {(one.type, one.name, one.verdict) for one in compare(sent, running(DUMP))}
    assert found == {
        ("clusters", "a", "same"),
        ("clusters", "b", "warming"),
        ("clusters", "c", "missing"),
        ("extensions", "f", "unused"),
        ("clusters", "old", "only in Envoy"),
        ("endpoints", "a", "same"),
        ("listeners", "l", "differs"),
        ("listeners", "l", "draining"),
        ("listeners", "bad", "refused"),
    }
    (other,) = compare(
        [_sent("endpoints", "a", "e1", **_endpoint(9001))], [e for e in running(DUMP) if e.type == "endpoints"]
    )
    assert other.verdict == "differs"


def test_what_is_no_dump_is_told() -> None:
    with pytest.raises(ValueError, match="no configuration dump"):
        running({"error": "x"})


@pytest.fixture
def told(mesh: FakeMesh) -> FakeMesh:
    response = local.GetConfigDumpResponse()
    proxy = response.proxies.add(
        name="client-0", connected=True, version="2", acked_version="1", rejection="no such filter"
    )
    one = proxy.resources.add(type="clusters", name="a", version="c1", size=100, acked=True)
    one.content.update({"name": "a", "connect_timeout": "10s"})
    proxy.resources.add(type="secrets", name="default", version="s1", size=1)
    mesh.local["GetConfigDump"] = lambda _request, _context: response
    return mesh


def test_a_summary_counts_what_was_taken_and_tells_a_refusal(told: FakeMesh) -> None:
    result = told.run("config", "summary")
    assert result.exit_code == 0, result.stderr
    assert "client-0 refused: no such filter" in result.stdout
    found = json.loads(told.run("config", "summary", "client", "-o", "json").stdout)
    assert found["proxies"][0]["counts"] == {
        "clusters": {"acked": 1, "sent": 1},
        "secrets": {"acked": 0, "sent": 1},
    }
    assert told.local.requests["GetConfigDump"][-1].proxy == "client"


def test_a_dump_shows_versions_and_contents_but_no_secret(told: FakeMesh) -> None:
    assert "c1" in told.run("config", "dump", "client-0").stdout
    assert not told.local.requests["GetConfigDump"][-1].content
    for output, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        result = told.run("config", "dump", "client-0", "--type", "clusters", "-o", output)
        resources = read(result.stdout)["proxies"][0]["resources"]
        assert resources[0]["content"] == {"name": "a", "connect_timeout": "10s"}
        assert "content" not in resources[1]
    assert told.local.requests["GetConfigDump"][-1].type == "clusters"


class _Admin(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(DUMP).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture
def admin_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Admin)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("mlmesh_local.sidecar.ADMIN_PORT", server.server_port)
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_with_live_a_difference_is_an_exit_code(told: FakeMesh, admin_port: int) -> None:
    response = told.local._answers["GetConfigDump"](None, None)
    response.proxies[0].admin_address = f"127.0.0.1:{admin_port}"
    result = told.run("config", "summary", "--live")
    assert result.exit_code == 1
    assert "only in Envoy" in result.stdout
    assert "are not what was sent" in result.stderr
    response.proxies[0].admin_address = ""
    assert "it has no admin interface" in told.run("config", "dump", "--live").stdout


def test_an_envoy_that_does_not_answer_is_told(told: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr("mlmesh_local.sidecar.ADMIN_PORT", taken.getsockname()[1])
    told.local._answers["GetConfigDump"](None, None).proxies[0].admin_address = "127.0.0.1:15000"
    result = told.run("config", "summary", "--live")
    assert "client-0: the admin interface of Envoy at 127.0.0.1 does not answer" in result.stdout
