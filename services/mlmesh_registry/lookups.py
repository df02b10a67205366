"""Finding what a request names, inside a transaction, or the contract's word for why it cannot be used."""

from datetime import datetime

import sqlalchemy as sa

from mlmesh_registry import names, rows
from mlmesh_registry.names import VersionName
from mlmesh_registry.versions import Model, Version
from mlmesh_runtime.errors import Conflict, NotFound, WrongState


def model_of(connection: sa.Connection, model_id: str) -> Model:
    """Read a model, deleted or not. Errors: NotFound (MODEL_NOT_FOUND)."""
    model = rows.model(connection, model_id)
    if model is None:
        raise NotFound(f"{names.model_name(model_id)} not found", reason="MODEL_NOT_FOUND")
    return model


def live_model(connection: sa.Connection, model_id: str) -> Model:
    """Read a model that is not deleted. Errors: NotFound (MODEL_NOT_FOUND), WrongState (MODEL_DELETED)."""
    model = model_of(connection, model_id)
    if model.purge_time is not None:
        text = f"{model.name} is deleted until {_spelled(model.purge_time)}, when it goes for good; undelete it first"
        raise WrongState(text, reason="MODEL_DELETED")
    return model


def version_of(connection: sa.Connection, name: VersionName) -> Version:
    """Read a version, deleted or not. Errors: NotFound (MODEL_VERSION_NOT_FOUND)."""
    version = rows.version(connection, name.model, name.number)
    if version is None:
        raise NotFound(f"{name} not found", reason="MODEL_VERSION_NOT_FOUND")
    return version


def live_version(connection: sa.Connection, name: VersionName) -> Version:
    """Read a version that is not deleted. Errors: as version_of, WrongState (VERSION_DELETED)."""
    version = version_of(connection, name)
    if version.purge_time is not None:
        text = f"{name} is deleted until {_spelled(version.purge_time)}, when it goes for good; undelete it first"
        raise WrongState(text, reason="VERSION_DELETED")
    return version


def check_etag(name: str, present: str, given: str) -> None:
    """Compare what was read with what is there. Errors: Conflict (ETAG_MISMATCH)."""
    if given == present:
        return
    if not present:
        text = f"{name} is not there any more; to create it, send no etag"
    elif not given:
        text = f"{name} is there already; to move it, send its etag"
    else:
        text = f"{name} has moved on since the etag was read; read it again"
    raise Conflict(text, reason="ETAG_MISMATCH", metadata={"etag": present})


def check_etag_if_given(name: str, present: str, given: str) -> None:
    """As check_etag; no etag takes whatever is there."""
    if given:
        check_etag(name, present, given)


def _spelled(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
