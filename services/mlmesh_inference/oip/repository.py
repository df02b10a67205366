"""Loads and unloads by hand: what the protocol's requests ask for, in any dialect, and what carries it out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from mlmesh_inference.oip import dialects
from mlmesh_inference.oip.model_config import read_json
from mlmesh_inference.overrides import FILE_PREFIX, FILES_MAX, Override, file_of
from mlmesh_runtime.errors import InvalidInput, MeshError, Unsupported
from open_inference import grpc_service_pb2 as pb

_MODEL_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
# With files a model needs a name that the registry could have given it: its folder in the cache is named so.
_OWN_NAME: Final = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")

Parameters = Mapping[str, pb.ModelRepositoryParameter]


class Repository(Protocol):
    """Loads and unloads by hand, beside what the selectors ask for."""

    async def load(self, model: str, override: Override | None = None) -> None:
        """Load a model, or load it again. What serves goes on until the new one is ready, and for good if it fails.

        Raises NotFound when the repository does not have it, WrongState when it cannot be served.
        """

    async def unload(self, model: str, *, dependents: bool = False) -> None:
        """Take a model out of service, if asked with the models that it is made of. Raises NotFound."""

    def known(self) -> Sequence[tuple[str, int, str]]:
        """(model, version, why it is not served) of every version of the repository, served or not."""


def named(request: dialects.RepositoryRequest) -> str:
    """The model of a load or unload. Raises InvalidInput for a name that could be a path."""
    if request.repository_name and request.model_name:
        raise Unsupported("'repository_name' specification is not supported")
    name = dialects.model_named(request)
    if not _MODEL_NAME.fullmatch(name):
        verb = "load" if isinstance(request, pb.RepositoryModelLoadRequest) else "unload"
        raise InvalidInput(f"failed to {verb} {name[:64]!r}, that is not the name of a model", field="model_name")
    return name


def override_of(model: str, parameters: Parameters, *, files_allowed: bool) -> Override | None:
    """What a load's parameters say; None when there are none. Blocking: parses, and may take a while.

    Raises InvalidInput or Unsupported, with texts that begin as the protocol's clients expect.
    """
    if not parameters:
        return None
    try:
        return _override(model, parameters, files_allowed=files_allowed)
    except MeshError as error:
        text = f"failed to load '{model}', failed to poll from model repository: {error.message}"
        if isinstance(error, InvalidInput):
            raise InvalidInput(text, field=error.field) from None
        raise Unsupported(text) from None


def _override(model: str, parameters: Parameters, *, files_allowed: bool) -> Override:
    files: dict[int, dict[str, bytes]] = {}
    config = None
    for name in sorted(parameters):
        value = parameters[name]
        choice = value.WhichOneof("parameter_choice")
        if name == "config":
            if choice != "string_param":
                text = "invalid value type for load parameter 'config', expected string_param."
                raise InvalidInput(text, field="parameters[config]")
            config = read_json(value.string_param)
        elif name.startswith(FILE_PREFIX):
            if not files_allowed:
                raise Unsupported(
                    "files may not be sent along here: whoever sends a model runs what it likes (MLMESH_LOAD_FILES)"
                )
            if choice != "bytes_param":
                text = f"invalid value type for load parameter '{name[:64]}', expected bytes_param."
                raise InvalidInput(text, field="parameters")
            version, path = file_of(name)
            files.setdefault(version, {})[path] = value.bytes_param
        else:
            raise InvalidInput(f"unrecognized load parameter '{name[:64]}'.", field="parameters")
    if config is None:
        raise InvalidInput("override files need the parameter 'config'", field="parameters[config]")
    if sum(map(len, files.values())) > FILES_MAX:
        raise InvalidInput(f"expected at most {FILES_MAX} files, got more", field="parameters")
    if files and not _OWN_NAME.fullmatch(model):
        raise InvalidInput(f"{model[:64]!r} is not a name for a model of one's own", field="model_name")
    return Override(config=config, files=files)


def unload_dependents(parameters: Parameters) -> bool:
    """What an unload's parameters say. Raises InvalidInput, Unsupported."""
    if unknown := set(parameters) - {"unload_dependents"}:
        raise InvalidInput(f"unrecognized unload parameter '{min(unknown)[:64]}'.", field="parameters")
    if not parameters:
        return False
    value = parameters["unload_dependents"]
    if value.WhichOneof("parameter_choice") != "bool_param":
        text = "invalid value type for 'unload_dependents' parameter, expected bool_param."
        raise InvalidInput(text, field="parameters[unload_dependents]")
    return value.bool_param
