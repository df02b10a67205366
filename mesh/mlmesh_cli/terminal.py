"""Where results go: tables for people, JSON for scripts; problems go to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import IO, TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from mlmesh_cli.errors import HINTS_BY_CODE, HINTS_OFFLINE, CliError, ExitCode, from_rpc, leaves, usage_error
from mlmesh_cli.options import OutputFormat
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import MeshError

if TYPE_CHECKING:
    from google.protobuf.message import Message

# A pipe has no width, and rich then takes 80: wide enough that no table breaks its cells. COLUMNS still decides.
_PIPE_COLUMNS = 160
_RICH_COLUMNS = 80

# What a command may end with and a person can act on; the rest is a defect and shows its traceback.
_KNOWN = (CliError, MeshError, ConfigError, OSError)

JsonValue = Mapping[str, Any] | list[Any]


def message_dict(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON values, with the field names of the proto and absent scalars spelled out."""
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415  keeps `mlmesh --help` quick

    result: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return result


class Terminal:
    """Prints in the format that was asked for.

    Args:
        output: table or json.
        out, err: streams; standard output and standard error when absent.
    """

    def __init__(self, output: OutputFormat, *, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.output = output
        self.out = _console(out or sys.stdout)
        self.err = _console(err or sys.stderr)

    @property
    def json(self) -> bool:
        """Whether JSON was asked for."""
        return self.output is OutputFormat.JSON

    def show(self, renderable: RenderableType | Callable[[], RenderableType], value: Message | JsonValue) -> None:
        """Prints one whole result: the renderable (or what the function draws), or the value as indented JSON."""
        if self.json:
            self._write(json.dumps(_plain(value), indent=2))
            return
        self.out.print(renderable() if callable(renderable) else renderable)

    def line(self, value: Message | JsonValue) -> None:
        """Prints one object of a stream as one line of JSON; prints nothing when tables were asked for."""
        if self.json:
            self._write(json.dumps(_plain(value), separators=(",", ":")))

    def say(self, text: RenderableType) -> None:
        """Prints something that only people read; with JSON output it goes to standard error."""
        (self.err if self.json else self.out).print(text)

    def unwrapped(self, text: str) -> None:
        """Like `say`, for a line that is copied as it is: never wrapped, never cut."""
        (self.err if self.json else self.out).print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints what a person should know and no script needs, to standard error."""
        self.err.print(Text("note:  ", style="bold yellow") + Text(text, style="default"), soft_wrap=True)

    def fail(self, error: CliError) -> None:
        """Prints a problem and its hint, to standard error."""
        if self.json:
            body = {
                "problem": error.problem,
                "problems": [line.strip() for line in error.problem.splitlines()],
                "hint": error.hint,
                "reason": error.reason,
                "exit_code": error.exit_code,
            }
            self.err.file.write(json.dumps({"error": body}) + "\n")
            self.err.file.flush()
            return
        self.err.print(Text("error: ", style="bold red") + Text(error.problem, style="default"), soft_wrap=True)
        if error.hint:
            self.err.print(Text("hint:  ", style="bold cyan") + Text(error.hint, style="default"), soft_wrap=True)

    def _write(self, text: str) -> None:
        self.out.file.write(text + "\n")
        self.out.file.flush()


def _console(stream: IO[str]) -> Console:
    plain = Console(file=stream, highlight=False, emoji=False)
    if plain.is_terminal or plain.width != _RICH_COLUMNS:
        return plain
    return Console(file=stream, highlight=False, emoji=False, width=_PIPE_COLUMNS)


def _plain(value: Message | JsonValue) -> JsonValue:
    return value if isinstance(value, (dict, list)) else message_dict(value)  # type: ignore[arg-type]


def run(terminal: Terminal, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a command's coroutine and turns what goes wrong into a line, a hint and an exit code.

    Raises:
        typer.Exit: with a code of `ExitCode` when it did not go well.
    """
    import asyncio  # noqa: PLC0415  keeps `mlmesh --help` quick

    import grpc  # noqa: PLC0415

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except (*_KNOWN, grpc.aio.AioRpcError, BaseExceptionGroup) as error:
        known = next((e for e in leaves(error) if isinstance(e, (*_KNOWN, grpc.aio.AioRpcError))), None)
        if known is None or isinstance(known, BrokenPipeError):
            raise
        cli_error = _cli_error(known)
        terminal.fail(cli_error)
        raise typer.Exit(cli_error.exit_code) from None


def _cli_error(error: BaseException) -> CliError:
    if isinstance(error, CliError):
        return error
    if isinstance(error, MeshError):
        return CliError(error.message, HINTS_OFFLINE.get(error.reason, ""), reason=error.reason)
    if isinstance(error, ConfigError):
        return usage_error(str(error), "the environment variables MLMESH_*_TARGET are host:port")
    if isinstance(error, TimeoutError):
        return CliError("it took too long", HINTS_BY_CODE["DEADLINE_EXCEEDED"], reason="TIMED_OUT")
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return CliError(f"{error.strerror or error}{where}", reason="OS_ERROR")
    return from_rpc(error)  # type: ignore[arg-type]
