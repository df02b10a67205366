"""The environment of a process, read once through an injected mapping. Nothing else reads it.

`VARIABLES` is the table that the README shows and a test compares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from mlmesh_runtime.limits import DEFAULT, Limits

T = TypeVar("T")


class ConfigError(Exception):
    """The environment is wrong; the text names the variable, what was expected and what came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable, its default ("" means unset) and what it means."""

    name: str
    default: str
    meaning: str


VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="MLMESH_LISTEN",
        default="127.0.0.1:9000",
        meaning="Where the gRPC server listens: host:port (port 0 picks a free one) or unix:path (mode 0600).",
    ),
    Variable(
        name="MLMESH_TRANSPORT",
        default="grpcio",
        meaning=(
            "What speaks gRPC: grpcio; native (the optional module mlmesh_front, faster, without TLS: for the side "
            "behind a sidecar); or auto: native where the module is installed and no TLS is served."
        ),
    ),
    Variable(
        name="MLMESH_METRICS_LISTEN",
        default="",
        meaning="Where Prometheus metrics are served over HTTP at /metrics: host:port. Empty: nowhere.",
    ),
    Variable(name="MLMESH_DATA_DIR", default="data", meaning="The folder in which the service keeps its state."),
    Variable(name="MLMESH_LOG_LEVEL", default="info", meaning="debug (with access logs), info, warning or error."),
    Variable(
        name="MLMESH_LOG_FORMAT",
        default="json",
        meaning="json (one object a line, with trace ids) or text (for people).",
    ),
    Variable(
        name="MLMESH_CHANNELZ",
        default="0",
        meaning="1: channelz is served beside the service: its connections and their figures, for who debugs.",
    ),
    Variable(
        name="MLMESH_IDENTITY_SOURCE",
        default="none",
        meaning=(
            "Where the caller's SPIFFE identity comes from. xfcc: the last element of x-forwarded-client-cert, which "
            "the sidecar appends (only where nothing but the sidecar reaches the port). tls: the one URI SAN of the "
            "client certificate. none: identities are unknown."
        ),
    ),
    Variable(
        name="MLMESH_TLS_CERT",
        default="",
        meaning="Certificate chain file (PEM). With _KEY and _CA: mutual TLS. All empty: plaintext, behind a sidecar.",
    ),
    Variable(name="MLMESH_TLS_KEY", default="", meaning="Private key file (PEM) of the certificate."),
    Variable(name="MLMESH_TLS_CA", default="", meaning="File (PEM) of the authorities whose certificates are trusted."),
    Variable(
        name="MLMESH_TLS_RELOAD_S",
        default="5",
        meaning="How often, at most, the three files are looked at again; new connections use what was found.",
    ),
    Variable(
        name="MLMESH_DRAIN_S",
        default="0",
        meaning="Seconds between health NOT_SERVING and closing the port, for endpoints to learn of it.",
    ),
    Variable(
        name="MLMESH_GRACE_S",
        default="10",
        meaning="Seconds that calls in flight get to finish after the port is closed; then they are cancelled.",
    ),
    Variable(
        name="MLMESH_OUTBOUND_HOST",
        default="",
        meaning=(
            "Dial this address with the target's port and send the target as :authority (the laptop mesh's outbound "
            "listener). Empty: dial the target itself, as on Kubernetes where the sidecar captures it."
        ),
    ),
    Variable(
        name="MLMESH_REGISTRY_TARGET",
        default="registry.mlmesh.svc.cluster.local:9000",
        meaning="The model registry, host:port.",
    ),
    Variable(
        name="MLMESH_SERVE",
        default="",
        meaning="What an inference process serves: a comma list of NAME@ALIAS, *@ALIAS, NAME/VERSION or NAME.",
    ),
    Variable(
        name="MLMESH_MESSAGE_BYTES_MAX", default="16777216", meaning="Largest message sent or received, in bytes."
    ),
    Variable(name="MLMESH_CONCURRENT_RPCS_MAX", default="1000", meaning="RPCs handled at once; more are refused."),
    Variable(
        name="MLMESH_STREAMS_PER_PEER_MAX",
        default="100",
        meaning="Streaming RPCs at once from one identity, or from one address where identities are unknown.",
    ),
    Variable(
        name="MLMESH_STREAM_IDLE_S",
        default="600",
        meaning="A request stream on which nothing moved for this long is ended. 0: never.",
    ),
    Variable(
        name="OTEL_EXPORTER_OTLP_ENDPOINT",
        default="",
        meaning="Where traces are sent over OTLP/gRPC, as http://host:port. Empty: nowhere.",
    ),
    Variable(name="OTEL_SERVICE_NAME", default="", meaning="The service's name in traces and logs; default: its own."),
    Variable(
        name="OTEL_TRACES_SAMPLER",
        default="parentbased_always_off",
        meaning=(
            "Who decides to record: parentbased_always_off (only what the caller sampled), parentbased_always_on, "
            "parentbased_traceidratio, always_on, always_off or traceidratio."
        ),
    ),
    Variable(name="OTEL_TRACES_SAMPLER_ARG", default="1.0", meaning="The ratio of a traceidratio sampler, 0 to 1."),
    Variable(name="POD_NAME", default="", meaning="The instance's name in logs, metrics and traces."),
    Variable(name="POD_NAMESPACE", default="mlmesh", meaning="The instance's namespace in logs and traces."),
)

_DEFAULTS: Mapping[str, str] = MappingProxyType({v.name: v.default for v in VARIABLES})
_SAMPLERS = frozenset(
    {
        "parentbased_always_off",
        "parentbased_always_on",
        "parentbased_traceidratio",
        "always_on",
        "always_off",
        "traceidratio",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Files of a mutual TLS identity (PEM). They may be replaced while the process runs."""

    cert: Path
    key: Path
    ca: Path
    reload_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a process was told. Build it with `from_environment`; in code and tests build it directly."""

    service: str
    listen: str = "127.0.0.1:0"
    transport: str = "grpcio"
    metrics_listen: str = ""
    data_dir: Path = Path("data")
    log_level: str = "info"
    log_format: str = "json"
    channelz: bool = False
    identity_source: str = "none"
    tls: TlsFiles | None = None
    drain_s: float = 0.0
    grace_s: float = 10.0
    outbound_host: str = ""
    registry_target: str = "registry.mlmesh.svc.cluster.local:9000"
    serve: str = ""
    otlp_endpoint: str = ""
    traces_sampler: str = "parentbased_always_off"
    traces_sampler_ratio: float = 1.0
    pod_name: str = ""
    pod_namespace: str = "mlmesh"
    limits: Limits = DEFAULT
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}), repr=False)
    """The mapping the settings were read from, for variables of a service's own `config` module."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], *, service: str) -> Settings:
        """Read and check every variable. Raises ConfigError that names the first wrong one."""
        read = _Reader(environ)
        tls = read.tls()
        return cls(
            service=read.text("OTEL_SERVICE_NAME") or service,
            listen=read.address("MLMESH_LISTEN"),
            transport=read.choice("MLMESH_TRANSPORT", {"grpcio", "native", "auto"}),
            metrics_listen=read.address("MLMESH_METRICS_LISTEN", unix=False),
            data_dir=Path(read.text("MLMESH_DATA_DIR")),
            log_level=read.choice("MLMESH_LOG_LEVEL", {"debug", "info", "warning", "error"}),
            log_format=read.choice("MLMESH_LOG_FORMAT", {"json", "text"}),
            channelz=read.choice("MLMESH_CHANNELZ", {"0", "1"}) == "1",
            identity_source=read.identity_source(tls),
            tls=tls,
            drain_s=read.seconds("MLMESH_DRAIN_S"),
            grace_s=read.seconds("MLMESH_GRACE_S"),
            outbound_host=read.text("MLMESH_OUTBOUND_HOST"),
            registry_target=read.text("MLMESH_REGISTRY_TARGET"),
            serve=read.text("MLMESH_SERVE"),
            otlp_endpoint=read.endpoint("OTEL_EXPORTER_OTLP_ENDPOINT"),
            traces_sampler=read.choice("OTEL_TRACES_SAMPLER", _SAMPLERS),
            traces_sampler_ratio=read.ratio("OTEL_TRACES_SAMPLER_ARG"),
            pod_name=read.text("POD_NAME"),
            pod_namespace=read.text("POD_NAMESPACE"),
            limits=Limits(
                message_bytes_max=read.count("MLMESH_MESSAGE_BYTES_MAX"),
                concurrent_rpcs_max=read.count("MLMESH_CONCURRENT_RPCS_MAX"),
                streams_per_peer_max=read.count("MLMESH_STREAMS_PER_PEER_MAX"),
                stream_idle_s=read.seconds("MLMESH_STREAM_IDLE_S"),
            ),
            environ=MappingProxyType(dict(environ)),
        )


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[v6]:port". Raises ValueError when it is neither."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"expected host:port, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


class _Reader:
    """Reads variables, each with its own kind of check."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str) -> str:
        return self._environ.get(name, "").strip() or _DEFAULTS[name]

    def choice(self, name: str, allowed: set[str] | frozenset[str]) -> str:
        value = self.text(name).lower()
        if value not in allowed:
            raise ConfigError(f"{name}: expected one of {', '.join(sorted(allowed))}; got {value!r}")
        return value

    def seconds(self, name: str) -> float:
        value = self._number(name, float)
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name}: expected seconds, 0 or more; got {self.text(name)!r}")
        return value

    def ratio(self, name: str) -> float:
        value = self._number(name, float)
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}: expected a ratio from 0 to 1; got {self.text(name)!r}")
        return value

    def count(self, name: str) -> int:
        value = self._number(name, int)
        if not 0 < value < 2**31:
            raise ConfigError(f"{name}: expected a number from 1 to {2**31 - 1}; got {self.text(name)!r}")
        return value

    def address(self, name: str, *, unix: bool = True) -> str:
        value = self.text(name)
        if not value or (unix and value.startswith("unix:") and len(value) > len("unix:")):
            return value
        try:
            split_address(value)
        except ValueError:
            forms = "host:port or unix:path" if unix else "host:port"
            raise ConfigError(f"{name}: expected {forms}; got {value!r}") from None
        return value

    def endpoint(self, name: str) -> str:
        value = self.text(name)
        if value and not value.startswith(("http://", "https://")):
            raise ConfigError(f"{name}: expected http://host:port or https://host:port; got {value!r}")
        return value

    def tls(self) -> TlsFiles | None:
        names = ("MLMESH_TLS_CERT", "MLMESH_TLS_KEY", "MLMESH_TLS_CA")
        given = [name for name in names if self.text(name)]
        if not given:
            return None
        if missing := [name for name in names if name not in given]:
            raise ConfigError(f"{missing[0]}: mutual TLS needs all of {', '.join(names)}; it is empty")
        cert, key, ca = (Path(self.text(name)) for name in names)
        return TlsFiles(cert=cert, key=key, ca=ca, reload_s=self.seconds("MLMESH_TLS_RELOAD_S"))

    def identity_source(self, tls: TlsFiles | None) -> str:
        value = self.choice("MLMESH_IDENTITY_SOURCE", {"xfcc", "tls", "none"})
        if value == "tls" and tls is None:
            raise ConfigError("MLMESH_IDENTITY_SOURCE: tls needs MLMESH_TLS_CERT, _KEY and _CA; they are empty")
        if value == "xfcc" and tls is not None:
            # Clients that reach the port themselves would write the header themselves.
            raise ConfigError("MLMESH_IDENTITY_SOURCE: expected tls or none where MLMESH_TLS_CERT is set; got 'xfcc'")
        return value

    def _number(self, name: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(self.text(name))
        except ValueError:
            raise ConfigError(f"{name}: expected a number; got {self.text(name)!r}") from None
