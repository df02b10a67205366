"""Settings out of an environment."""

import re
from pathlib import Path

import pytest

from mlmesh_runtime import config
from mlmesh_runtime.config import ConfigError, Settings


def read(**environ: str) -> Settings:
    return Settings.from_environment(environ, service="registry")


def test_an_empty_environment_is_a_plaintext_loopback_service() -> None:
    settings = read()
    assert settings.listen == "127.0.0.1:9000"
    assert settings.service == "registry"
    assert settings.tls is None
    assert settings.identity_source == "none"
    assert settings.limits.message_bytes_max == 16 * 1024 * 1024


def test_everything_is_read() -> None:
    settings = read(
        MLMESH_LISTEN="unix:/tmp/x.sock",
        MLMESH_METRICS_LISTEN="[::1]:9090",
        MLMESH_DATA_DIR="/var/lib/x",
        MLMESH_LOG_LEVEL="DEBUG",
        MLMESH_IDENTITY_SOURCE="tls",
        MLMESH_TLS_CERT="c",
        MLMESH_TLS_KEY="k",
        MLMESH_TLS_CA="a",
        MLMESH_TLS_RELOAD_S="0.5",
        MLMESH_DRAIN_S="3",
        MLMESH_GRACE_S="7.5",
        MLMESH_OUTBOUND_HOST="127.70.3.1",
        MLMESH_SERVE="*@stable",
        MLMESH_STREAMS_PER_PEER_MAX="7",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4317",
        OTEL_SERVICE_NAME="inference-v1",
        POD_NAME="inference-v1-0",
    )
    assert settings.tls is not None
    assert (settings.tls.cert, settings.tls.reload_s) == (Path("c"), 0.5)
    assert settings.limits.streams_per_peer_max == 7
    assert settings.service == "inference-v1"
    assert settings.log_level == "debug"
    assert (settings.drain_s, settings.grace_s) == (3.0, 7.5)
    assert settings.environ["MLMESH_SERVE"] == "*@stable"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLMESH_LISTEN", "9000"),
        ("MLMESH_LISTEN", "host:99999"),
        ("MLMESH_LISTEN", ":9000"),
        ("MLMESH_LISTEN", "unix:"),
        ("MLMESH_METRICS_LISTEN", "unix:/tmp/m"),
        ("MLMESH_LOG_LEVEL", "loud"),
        ("MLMESH_LOG_FORMAT", "xml"),
        ("MLMESH_IDENTITY_SOURCE", "header"),
        ("MLMESH_IDENTITY_SOURCE", "tls"),
        ("MLMESH_DRAIN_S", "-1"),
        ("MLMESH_DRAIN_S", "nan"),
        ("MLMESH_GRACE_S", "inf"),
        ("MLMESH_GRACE_S", "soon"),
        ("MLMESH_MESSAGE_BYTES_MAX", "0"),
        ("MLMESH_MESSAGE_BYTES_MAX", "16MiB"),
        ("MLMESH_TLS_CERT", "only-one-of-three.pem"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "127.0.0.1:4317"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "2"),
    ],
)
def test_a_wrong_variable_is_named_with_what_came(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{name: value})
    assert str(caught.value).startswith(("MLMESH_TLS_KEY" if name == "MLMESH_TLS_CERT" else name) + ":")
    assert "expected" in str(caught.value) or "needs" in str(caught.value)


def test_the_header_is_not_believed_where_clients_connect_themselves() -> None:
    files = {"MLMESH_TLS_CERT": "c", "MLMESH_TLS_KEY": "k", "MLMESH_TLS_CA": "a"}
    with pytest.raises(ConfigError, match="MLMESH_IDENTITY_SOURCE: expected tls or none"):
        read(MLMESH_IDENTITY_SOURCE="xfcc", **files)


def test_every_variable_read_is_in_the_table() -> None:
    source = Path(config.__file__).read_text("utf-8")
    body = source[source.index("class Settings") :]
    read_names = set(re.findall(r'"((?:MLMESH|OTEL|POD)_[A-Z_]+)"', body))
    table = {variable.name for variable in config.VARIABLES}
    assert read_names == table
    assert all(variable.meaning.endswith(".") for variable in config.VARIABLES)
    assert len(table) == len(config.VARIABLES)


def test_the_tables_defaults_are_accepted() -> None:
    assert read(**{v.name: v.default for v in config.VARIABLES if v.name != "OTEL_SERVICE_NAME"}).service == "registry"
