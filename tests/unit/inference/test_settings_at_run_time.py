"""Log and trace settings that are changed while the process runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mlmesh_inference.oip.settings import LogControl
from mlmesh_inference.trace_settings import TraceSettings
from mlmesh_runtime.config import Settings
from mlmesh_runtime.errors import InvalidInput, MeshError, Unsupported
from mlmesh_runtime.logs import JsonFormatter
from open_inference import grpc_service_pb2 as pb


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, Lines]]:
    found = logging.getLogger("tests.settings_at_run_time")
    found.setLevel(logging.INFO)
    found.propagate = False
    lines = Lines()
    found.addHandler(lines)
    yield found, lines
    found.removeHandler(lines)


def asked(**settings: bool | int | str) -> dict[str, pb.LogSettingsRequest.SettingValue]:
    values = {}
    for name, value in settings.items():
        said = values[name] = pb.LogSettingsRequest.SettingValue()
        if isinstance(value, bool):
            said.bool_param = value
        elif isinstance(value, int):
            said.uint32_param = value
        else:
            said.string_param = value
    return values


def logged(logger: logging.Logger, lines: Lines) -> list[str]:
    lines.lines.clear()
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(logger, level)(level)
    return lines.lines


def test_levels_follow_the_settings(logger: tuple[logging.Logger, Lines]) -> None:
    control = LogControl(logger[0])
    assert control.shown() == {
        "log_file": "",
        "log_error": True,
        "log_info": True,
        "log_warning": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }
    assert logged(*logger) == ["info", "warning", "error", "critical"]
    control.update(asked(log_verbose_level=2))
    assert logged(*logger) == ["debug", "info", "warning", "error", "critical"]
    assert control.shown()["log_verbose_level"] == 2
    control.update(asked(log_verbose_level=0, log_warning=False))
    assert logged(*logger) == ["info", "error", "critical"]
    control.update(asked(log_info=False, log_error=False))
    assert logged(*logger) == []
    control.update(asked(log_info=True, log_warning=True, log_error=True))
    assert logged(*logger) == ["info", "warning", "error", "critical"]


def test_lines_of_json_have_iso_times_under_either_name(logger: tuple[logging.Logger, Lines]) -> None:
    logger[1].setFormatter(JsonFormatter(Settings(service="test")))
    control = LogControl(logger[0])
    for name in ("ISO8601", "default"):
        control.update(asked(log_format=name))
        assert control.shown()["log_format"] == name
    assert logged(*logger) == ["info", "warning", "error", "critical"]


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        (asked(log_file="/tmp/x"), Unsupported, "log file location can not be updated through network protocol"),
        (asked(log_format="ISO8601"), Unsupported, "log_format"),
        (asked(log_info=1), InvalidInput, "log_info"),
        (asked(log_verbose_level=True), InvalidInput, "log_verbose_level"),
        (asked(log_colour=True), InvalidInput, "unknown log setting 'log_colour'"),
        ({"log_info": pb.LogSettingsRequest.SettingValue()}, InvalidInput, "log_info"),
    ],
)
def test_log_settings_that_are_refused_change_nothing(
    settings: dict[str, pb.LogSettingsRequest.SettingValue],
    kind: type[MeshError],
    text: str,
    logger: tuple[logging.Logger, Lines],
) -> None:
    control = LogControl(logger[0])
    before = control.shown()
    with pytest.raises(kind, match=text):
        control.update({**asked(log_verbose_level=3), **settings})
    assert control.shown() == before
    assert logged(*logger) == ["info", "warning", "error", "critical"]


def admitted(settings: TraceSettings, model: str, requests: int = 12) -> int:
    return sum(settings.admits(model) for _ in range(requests))


def test_every_sampled_request_is_traced_at_first() -> None:
    settings = TraceSettings()
    assert admitted(settings, "m") == 12
    assert settings.shown() == {
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": ["1"],
        "trace_count": ["-1"],
        "trace_mode": ["opentelemetry"],
        "trace_file": [""],
        "log_frequency": ["0"],
    }


def test_rate_and_count_hold_for_all_or_for_one_model() -> None:
    settings = TraceSettings()
    settings.update("", {"trace_rate": ["3"]})
    settings.update("m", {"trace_rate": ["1"], "trace_count": ["5"]})
    assert (admitted(settings, "m"), admitted(settings, "other")) == (5, 4)
    assert settings.shown("m")["trace_count"] == ["0"]
    assert settings.shown("other")["trace_rate"] == ["3"]
    settings.update("m", {"trace_count": []})
    assert settings.shown("m")["trace_count"] == ["-1"]
    assert admitted(settings, "m") == 12
    settings.update("m", {"trace_rate": []})
    assert settings.shown("m")["trace_rate"] == ["3"]
    settings.update("", {"trace_rate": []})
    assert settings.shown("m")["trace_rate"] == ["1"]


def test_the_level_turns_a_model_off_and_on() -> None:
    settings = TraceSettings()
    settings.update("m", {"trace_level": ["OFF"]})
    assert (admitted(settings, "m"), admitted(settings, "other")) == (0, 12)
    settings.update("m", {"trace_level": ["TIMESTAMPS"]})
    assert admitted(settings, "m") == 12


def test_without_an_exporter_there_is_nothing_to_turn_on() -> None:
    settings = TraceSettings(exporting=False)
    assert settings.shown()["trace_level"] == ["OFF"]
    assert admitted(settings, "m") == 0
    with pytest.raises(Unsupported, match="exports no traces"):
        settings.update("", {"trace_level": ["TIMESTAMPS"]})


@pytest.mark.parametrize(
    ("name", "values", "kind", "text"),
    [
        ("trace_file", ["/tmp/x"], Unsupported, "trace file location can not be updated through network protocol"),
        ("trace_level", ["TENSORS"], Unsupported, "TENSORS"),
        ("trace_level", ["LOUD"], InvalidInput, "unknown trace level 'LOUD'"),
        ("trace_rate", ["0"], InvalidInput, "trace_rate"),
        ("trace_rate", ["x"], InvalidInput, "trace_rate"),
        ("trace_rate", ["9" * 5000], InvalidInput, "trace_rate"),
        ("trace_rate", ["1", "2"], InvalidInput, "expect only 1 value"),
        ("trace_count", ["-2"], InvalidInput, "trace_count"),
        ("trace_mode", ["triton"], Unsupported, "trace_mode"),
        ("trace_colour", ["red"], InvalidInput, "unknown trace setting"),
    ],
)
def test_trace_settings_that_are_refused_change_nothing(
    name: str, values: list[str], kind: type[MeshError], text: str
) -> None:
    settings = TraceSettings()
    before = settings.shown()
    with pytest.raises(kind, match=text):
        settings.update("", {"trace_rate": ["7"], name: values})
    assert settings.shown() == before
