"""An issuer of tokens and its keys: cases name it by a host, for which a server of loopback stands."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOST = "issuer.example.com"
"""Its name in cases: /keys has keys, /old has others, OpenID below /discovered tells where, elsewhere is nothing."""

_SETS = {
    path: json.dumps({"keys": [{"kty": "RSA", "kid": kid, "e": "AQAB", "n": "1NGCmrMys4hGfvDHXygmmGMetgfSHv1R"}]})
    for path, kid in (("/keys", "new"), ("/old", "old"))
}
_DISCOVERY = "/.well-known/openid-configuration"


@dataclass(frozen=True, slots=True)
class Issuer:
    """One that answers on loopback."""

    address: str

    def here(self, text: str) -> str:
        """A case's text that names where it answers."""
        return text.replace(HOST, self.address)

    def keys(self) -> Mapping[str, str]:
        """What the laptop mesh has of it when it asked: key sets by address."""
        found = {f"http://{self.address}{path}": text for path, text in _SETS.items()}
        found[f"http://{self.address}/discovered{_DISCOVERY}"] = _SETS["/keys"]
        return found


@contextlib.contextmanager
def issuer() -> Iterator[Issuer]:
    """Answer until it is left."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Issuer(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = _SETS.get(self.path, "")
        if self.path == f"/discovered{_DISCOVERY}":
            text = json.dumps({"jwks_uri": f"http://{self.headers['Host']}/keys"})
        self.send_response(200 if text else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""
