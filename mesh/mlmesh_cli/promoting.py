"""Moving an alias through a model's gates, and gates as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import yaml
from google.protobuf.json_format import ParseDict, ParseError
from rich.console import Group
from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, rpc_failure
from mlmesh_cli.render.registry import gate_results_table
from mlmesh_cli.terminal import Terminal, message_dict

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A version that an alias is to point at."""

    parent: str
    alias: str
    version: int
    reason: str

    def request(self, etag: str, *, validate_only: bool) -> pb.SetModelAliasRequest:
        """The request, for an alias with this etag."""
        return pb.SetModelAliasRequest(
            name=f"{self.parent}/aliases/{self.alias}",
            version=f"{self.parent}/versions/{self.version}",
            etag=etag,
            reason=self.reason,
            validate_only=validate_only,
        )


async def alias_of(stub: ModelRegistryServiceAsyncStub, parent: str, alias: str) -> pb.ModelAlias | None:
    """An alias of a model as it is now, None where there is none."""
    token = ""
    while True:
        request = pb.ListModelAliasesRequest(parent=parent, page_size=1000, page_token=token)
        page = await stub.ListModelAliases(request)
        for found in page.aliases:
            if found.name == f"{parent}/aliases/{alias}":
                return found
        token = page.next_page_token
        if not token:
            return None


async def promoted(
    stub: ModelRegistryServiceAsyncStub, wanted: Promotion, terminal: Terminal, *, dry_run: bool
) -> None:
    """Asks the gates, shows what they found, and moves the alias when all let it pass.

    Raises:
        CliError: a gate refused, or the alias moved in between.
    """
    before = await alias_of(stub, wanted.parent, wanted.alias)
    etag = before.etag if before else ""
    answer = await stub.SetModelAlias(wanted.request(etag, validate_only=True))
    refused = [result.gate for result in answer.gate_results if not result.passed]
    if not refused and not dry_run:
        try:
            answer = await stub.SetModelAlias(wanted.request(etag, validate_only=False))
        except grpc.aio.AioRpcError as error:
            if rpc_failure(error).reason != "GATE_REFUSED":
                raise
            # What a gate asks about changed since it was asked; ask once more, to show what it finds now.
            answer = await stub.SetModelAlias(wanted.request(etag, validate_only=True))
            refused = [result.gate for result in answer.gate_results if not result.passed]
    old = before.version.rpartition("/")[2] if before else "nothing"
    name = f"{wanted.parent.removeprefix('models/')}@{wanted.alias}"
    if refused:
        line = Text(f"{name} stays at {old}", style="bold red")
    else:
        line = Text(f"{name} {'would move' if dry_run else 'moved'} from {old} to {wanted.version}", style="green")
    value = {
        "alias": message_dict(answer.alias) if answer.HasField("alias") else None,
        "gate_results": [message_dict(result) for result in answer.gate_results],
        "moved": not refused and not dry_run,
        "dry_run": dry_run,
    }
    terminal.show(Group(gate_results_table(answer.gate_results), line), value)
    if refused:
        hint = "`mlmesh models gates show MODEL` shows the conditions"
        raise CliError(f"refused by {', '.join(refused)}", hint, reason="GATE_REFUSED")


def read_gates(path: Path) -> pb.Gates:
    """Gates of a YAML or JSON file: a list, or an object with the list as `gates`. Raises CliError."""
    hint = "the fields are those of Gate in protos/mlmesh/registry/v1; `mlmesh models gates show -o json` writes one"
    try:
        value: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CliError(f"{path} is not YAML: {' '.join(str(error).split())}", hint) from None
    if isinstance(value, list) or value is None:
        value = {"gates": value or []}
    if not isinstance(value, dict):
        raise CliError(f"{path} is not a list of gates", hint)
    try:
        return ParseDict(value, pb.Gates())
    except ParseError as error:
        raise CliError(f"{path}: {error}", hint) from None


def gates_value(model: pb.Model) -> dict[str, Any]:
    """The gates of a model as `read_gates` takes them."""
    return message_dict(pb.Gates(gates=model.gates))
