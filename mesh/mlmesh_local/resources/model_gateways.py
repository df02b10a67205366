"""What Gateways say, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At

ServerTlsMode = Literal["PASSTHROUGH", "SIMPLE", "MUTUAL", "AUTO_PASSTHROUGH", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """TLS of a gateway's server. Certificates are named (``credentials``) or files; empty is not given.

    Attributes:
        https_redirect: plain HTTP is answered with a redirect to HTTPS.
        credential_name, credential_names: secrets with the server's certificate; several for several kinds of keys.
        ca_credential_name: secret with the roots of clients, where they are not with the certificate.
        certificates: files of certificate chains with their keys.
        ca_certificates, ca_crl: files with the roots of clients, and with certificates that are revoked.
        verify_spki, verify_hash: base64 and hex of what clients' certificates must be.
        min_version, max_version: such as "TLSV1_2"; "TLS_AUTO" leaves Envoy's.
    """

    mode: ServerTlsMode = "PASSTHROUGH"
    https_redirect: bool = False
    credential_name: str = ""
    credential_names: tuple[str, ...] = ()
    ca_credential_name: str = ""
    certificates: tuple[tuple[str, str], ...] = ()
    ca_certificates: str = ""
    ca_crl: str = ""
    subject_alt_names: tuple[str, ...] = ()
    verify_spki: tuple[str, ...] = ()
    verify_hash: tuple[str, ...] = ()
    min_version: str = "TLS_AUTO"
    max_version: str = "TLS_AUTO"
    cipher_suites: tuple[str, ...] = ()
    insecure_skip_verify: bool = False

    @property
    def passes_through(self) -> bool:
        """Whether connections are forwarded without ending their TLS."""
        return self.mode in ("PASSTHROUGH", "AUTO_PASSTHROUGH")

    @property
    def credentials(self) -> tuple[str, ...]:
        """Names of the secrets with the server's certificates."""
        return self.credential_names or ((self.credential_name,) if self.credential_name else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayServer:
    """A port of a gateway. ``protocol`` is Istio's name in capitals, such as "HTTPS".

    ``hosts`` are without namespace parts; ``host_namespaces`` says for each from which namespace VirtualServices may
    bind to it: "*" for all, "~" for none. ``bind`` is an address or "unix://" with a path; ``name`` goes into
    statistics.
    """

    port: int
    port_name: str
    protocol: str
    hosts: tuple[str, ...]
    host_namespaces: tuple[str, ...]
    tls: ServerTls | None
    bind: str = ""
    name: str = ""
    at: At = field(compare=False)

    @property
    def speaks_http(self) -> bool:
        """Whether it takes requests without TLS."""
        return self.protocol in ("HTTP", "HTTP2", "GRPC", "GRPC-WEB", "HTTP_PROXY")

    @property
    def ends_https(self) -> bool:
        """Whether it ends TLS and takes requests."""
        return self.protocol == "HTTPS" and self.tls is not None and not self.tls.passes_through


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Servers of the proxies that the selector selects."""

    meta: Meta
    selector: Mapping[str, str]
    servers: tuple[GatewayServer, ...]
