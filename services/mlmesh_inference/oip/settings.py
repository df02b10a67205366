"""LogSettings: what the process logs, changed while it runs. Where it logs to and how lines look stays as it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from mlmesh_runtime.errors import InvalidInput, Unsupported
from mlmesh_runtime.logs import JsonFormatter
from open_inference import grpc_service_pb2 as pb

_LEVELS: Final = {"log_error": logging.ERROR, "log_warning": logging.WARNING, "log_info": logging.INFO}
_FORMATS: Final = ("default", "ISO8601")
_NOTHING: Final = logging.CRITICAL + 1

Values = Mapping[str, pb.LogSettingsRequest.SettingValue]


class LogControl:
    """The log's settings in the protocol's terms, over a logger whose handlers get everything.

    `log_verbose_level` above 0 logs what is for debugging; the other flags let their own level through, whatever the
    rest says.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger()
        self._verbose: int | None = None
        self._format = "default"
        self._flags: dict[str, bool] = {}
        self._filtered: list[tuple[logging.Handler, _Levels]] = []

    def shown(self) -> dict[str, bool | int | str]:
        """Every setting as it holds."""
        level = self._logger.level
        return {
            "log_file": "",
            **{name: self._flags.get(name, level <= floor) for name, floor in sorted(_LEVELS.items())},
            "log_verbose_level": int(level <= logging.DEBUG) if self._verbose is None else self._verbose,
            "log_format": self._format,
        }

    def _formats(self) -> tuple[str, ...]:
        """Lines stay as the process was started with; in JSON their times are ISO 8601, so that is a name for them."""
        iso = any(isinstance(handler.formatter, JsonFormatter) for handler in self._logger.handlers)
        return _FORMATS if iso else ("default",)

    def update(self, settings: Values) -> None:
        """Change settings, all or none. Raises InvalidInput, Unsupported for what cannot be changed here."""
        said: dict[str, bool | int | str] = {}
        for name, value in settings.items():
            choice = value.WhichOneof("parameter_choice")
            if name == "log_file":
                raise Unsupported("log file location can not be updated through network protocol")
            if name == "log_format":
                if choice != "string_param" or value.string_param not in _FORMATS:
                    raise InvalidInput(f"invalid argument for log_format, got: {value.string_param[:32]}", field=name)
                if value.string_param not in self._formats():
                    raise Unsupported("log_format: lines stay in the format that the process was started with")
                said[name] = value.string_param
            elif name == "log_verbose_level":
                if choice != "uint32_param":
                    raise InvalidInput(f"expect int32 for '{name}', as uint32", field=f"settings[{name}]")
                said[name] = value.uint32_param
            elif name in _LEVELS:
                if choice != "bool_param":
                    raise InvalidInput(f"expect boolean for '{name}'", field=f"settings[{name}]")
                said[name] = value.bool_param
            else:
                raise InvalidInput(f"unknown log setting '{name[:64]}'", field=f"settings[{name[:64]}]")
        if said:
            self._apply({**self.shown(), **said})

    def _apply(self, values: Mapping[str, bool | int | str]) -> None:
        self._verbose, self._format = int(values["log_verbose_level"]), str(values["log_format"])
        self._flags = {name: bool(values[name]) for name in _LEVELS}
        levels = {level for name, level in _LEVELS.items() if self._flags[name]}
        if self._verbose:
            levels.add(logging.DEBUG)
        self._logger.setLevel(min(levels, default=_NOTHING))
        self.restore()
        self._filtered = [(handler, _Levels(frozenset(levels))) for handler in self._logger.handlers]
        for handler, levels_only in self._filtered:
            handler.addFilter(levels_only)

    def restore(self) -> None:
        """Take the filters off the handlers again."""
        for handler, levels_only in self._filtered:
            handler.removeFilter(levels_only)
        self._filtered = []


class _Levels(logging.Filter):
    """Lets the levels through that were asked for; a level between two counts as the lower one."""

    def __init__(self, levels: frozenset[int]) -> None:
        super().__init__()
        self._levels = levels

    def filter(self, record: logging.LogRecord) -> bool:
        own = max((level for level in (logging.DEBUG, *_LEVELS.values()) if level <= record.levelno), default=0)
        return own in self._levels
