"""An MLflow server over its REST API: what a registered version is, and its files. Plain HTTP, no client of theirs."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mlmesh_cli.errors import CliError, usage_error

FILES_MAX = 256
DEPTH_MAX = 8
ANSWER_BYTES_MAX = 16 * 1024 * 1024
_TIMEOUT_S = 60.0
_CUTS_MAX = 5
_PAUSE_S = 0.5
_PIECE_BYTES = 1 << 20
_CUT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a version: its path in the version's folder, and its size in bytes."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteVersion:
    """What MLflow says of a registered version.

    Attributes:
        tags, model_tags: of the version, and of the registered model.
        metrics: of the run that made it; figures that are none are left out.
        source: where MLflow has it from.
        artifact_uri: where its files are.
    """

    name: str
    version: str
    description: str
    source: str
    artifact_uri: str
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    model_tags: Mapping[str, str] = field(default_factory=dict)
    model_description: str = ""
    aliases: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class MlflowServer:
    """Requests to one server.

    Args:
        url: http or https, as MLFLOW_TRACKING_URI has it.
        token: sent as a bearer token when it is not empty.
        user, password: sent instead when there is no token and the user is not empty.
        pause_s: before a download that was cut goes on.

    Raises (every method):
        CliError: the server refused, does not answer, or answers something else.
    """

    def __init__(
        self, url: str, *, token: str = "", user: str = "", password: str = "", pause_s: float = _PAUSE_S
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise usage_error(
                f"{_host(url)!r} is no address of an MLflow server",
                "such as http://127.0.0.1:5000, without a password in it",
            )
        self.url = url.rstrip("/")
        self._headers = {"User-Agent": "mlmesh", "Accept": "*/*"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        elif user:
            pair = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"
        self._pause_s = pause_s
        self._opener = urllib.request.build_opener(_SameHost())

    def version(self, name: str, *, version: str = "", alias: str = "") -> RemoteVersion:
        """A registered version by number or alias, with all that is known of it."""
        if alias:
            found = self._get("registered-models/alias", name=name, alias=alias)["model_version"]
        else:
            found = self._get("model-versions/get", name=name, version=version)["model_version"]
        number = str(found["version"])
        model = self._get("registered-models/get", name=name)["registered_model"]
        where = self._get("model-versions/get-download-uri", name=name, version=number)
        run_id = str(found.get("run_id") or "")
        return RemoteVersion(
            name=name,
            version=number,
            description=str(found.get("description") or ""),
            source=str(found.get("source") or ""),
            artifact_uri=str(where.get("artifact_uri") or ""),
            run_id=run_id,
            tags=_tags(found.get("tags")),
            model_tags=_tags(model.get("tags")),
            model_description=str(model.get("description") or ""),
            aliases=tuple(str(each["alias"]) for each in model.get("aliases") or () if str(each["version"]) == number),
            metrics=self._metrics(run_id),
        )

    def page_of(self, version: RemoteVersion) -> str:
        """Address of the version's page, for people: also what names it for good."""
        return f"{self.url}/#/models/{urllib.parse.quote(version.name, safe='')}/versions/{version.version}"

    def files(self, version: RemoteVersion) -> list[RemoteFile]:
        """Every file of a version."""
        found: list[RemoteFile] = []
        folders = [("", 0)]
        while folders:
            folder, depth = folders.pop()
            if depth > DEPTH_MAX:
                raise CliError(f"{version.name} has folders more than {DEPTH_MAX} deep")
            for entry in self._list(version, folder):
                path = f"{folder}/{_base(entry)}" if folder else _base(entry)
                if entry.get("is_dir"):
                    folders.append((path, depth + 1))
                else:
                    found.append(RemoteFile(path=path, size_bytes=int(entry.get("file_size") or 0)))
            if len(found) + len(folders) > FILES_MAX:
                raise CliError(f"{version.name} has more than {FILES_MAX} files")
        return sorted(found, key=lambda file: file.path)

    def read(self, version: RemoteVersion, path: str, bytes_max: int) -> bytes:
        """A small file."""
        with self._open(self._file_url(version, path)) as answer:
            data: bytes = answer.read(bytes_max + 1)
        if len(data) > bytes_max:
            raise CliError(f"{path} has more than {bytes_max} bytes")
        return data

    def download(self, version: RemoteVersion, file: RemoteFile, target: Path, progress: Progress) -> None:
        """A file, going on where it was cut when the server can."""
        url = self._file_url(version, file.path)
        with target.open("w+b") as out:
            for cut in range(_CUTS_MAX + 1):
                try:
                    self._fill(url, out, file, progress)
                    break
                except _CUT as error:
                    if cut == _CUTS_MAX or isinstance(error, urllib.error.HTTPError):
                        raise self._failed(error) from None
                    time.sleep(self._pause_s)
        if target.stat().st_size != file.size_bytes:
            raise CliError(
                f"{file.path} has {target.stat().st_size} bytes, {file.size_bytes} were told", "import it again"
            )

    def _fill(self, url: str, out: IO[bytes], file: RemoteFile, progress: Progress) -> None:
        have = out.tell()
        request = self._request(url)
        if have:
            request.add_header("Range", f"bytes={have}-")
        with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
            if have and answer.status != http.client.PARTIAL_CONTENT:
                # This server's storage knows no ranges: from the start again.
                out.seek(0)
                out.truncate()
                have = 0
            while piece := answer.read(_PIECE_BYTES):
                out.write(piece)
                have += len(piece)
                progress(have, file.size_bytes)
                if have > file.size_bytes:
                    raise CliError(f"{file.path} has more than the {file.size_bytes} bytes that were told")
        if have < file.size_bytes:
            raise ConnectionError(f"cut after {have} bytes")

    def _list(self, version: RemoteVersion, folder: str) -> list[dict[str, Any]]:
        """Entries of a folder, by the way that this version's files can be listed."""
        proxied = self._proxied(version)
        if proxied is not None:
            path = "/".join(part for part in (proxied, folder) if part)
            return _files(self._get("artifacts", prefix="mlflow-artifacts/", path=path))
        if version.source.startswith("models:/m-"):
            model_id = version.source.removeprefix("models:/").split("/")[0]
            method = f"logged-models/{urllib.parse.quote(model_id, safe='')}/artifacts/directories"
            return _files(self._get(method, **({"artifact_directory_path": folder} if folder else {})))
        if version.run_id and "/artifacts/" in version.artifact_uri:
            path = "/".join(
                part for part in (version.artifact_uri.split("/artifacts/", 1)[1].strip("/"), folder) if part
            )
            return _files(self._get("artifacts/list", run_id=version.run_id, path=path))
        raise CliError(
            f"the files of {version.name} version {version.version} cannot be listed by the server",
            "serve artifacts with `mlflow server --serve-artifacts`",
        )

    def _file_url(self, version: RemoteVersion, path: str) -> str:
        proxied = self._proxied(version)
        if proxied is not None:
            quoted = urllib.parse.quote(f"{proxied}/{path}" if proxied else path)
            return f"{self.url}/api/2.0/mlflow-artifacts/artifacts/{quoted}"
        query = urllib.parse.urlencode({"name": version.name, "version": version.version, "path": path})
        return f"{self.url}/model-versions/get-artifact?{query}"

    def _proxied(self, version: RemoteVersion) -> str | None:
        """Path of the version's folder in the server's own storage, None where it is elsewhere."""
        parts = urllib.parse.urlsplit(version.artifact_uri)
        if parts.scheme == "mlflow-artifacts" and not parts.netloc:
            return parts.path.strip("/")
        return None

    def _metrics(self, run_id: str) -> dict[str, float]:
        if not run_id:
            return {}
        try:
            found = self._get("runs/get", run_id=run_id)["run"]["data"].get("metrics") or ()
        except CliError as error:
            # A run may be deleted, and its version still be good.
            if error.reason != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
        return {str(each["key"]): float(each["value"]) for each in found}

    def _get(self, method: str, *, prefix: str = "mlflow/", **arguments: str) -> dict[str, Any]:
        url = f"{self.url}/api/2.0/{prefix}{method}"
        with self._open(f"{url}?{urllib.parse.urlencode(arguments)}" if arguments else url) as answer:
            data = answer.read(ANSWER_BYTES_MAX + 1)
        try:
            value = json.loads(data) if len(data) <= ANSWER_BYTES_MAX else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise CliError(f"{self.url} does not answer like an MLflow server", "check its address")
        return value

    def _open(self, url: str) -> Any:
        try:
            return self._opener.open(self._request(url), timeout=_TIMEOUT_S)
        except _CUT as error:
            raise self._failed(error) from None

    def _request(self, url: str) -> urllib.request.Request:
        return urllib.request.Request(url, headers=self._headers)  # noqa: S310  the scheme was checked

    def _failed(self, error: BaseException) -> CliError:
        if not isinstance(error, urllib.error.HTTPError):
            why = getattr(error, "reason", None) or error
            return CliError(
                f"{self.url} does not answer: {why}", "is the MLflow server running there?", reason="UNAVAILABLE"
            )
        code, message = "", ""
        try:
            told = json.loads(error.read(ANSWER_BYTES_MAX))
            code, message = str(told.get("error_code", "")), str(told.get("message", ""))
        except (ValueError, AttributeError, OSError):
            pass
        hint = "set the token's variable, see --token-variable" if error.code in (401, 403) else ""
        return CliError(
            f"{self.url}: {message or error.reason} (HTTP {error.code})", hint, reason=code or f"HTTP_{error.code}"
        )


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but takes no credentials to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:  # noqa: PLR0917
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request


def _files(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in answer.get("files") or () if isinstance(entry, dict)]


def _base(entry: Mapping[str, Any]) -> str:
    name = str(entry.get("path", "")).rstrip("/").rpartition("/")[2]
    if name in ("", ".", ".."):
        raise CliError("the server lists a file without a name")
    return name


def _tags(found: Any) -> dict[str, str]:
    return {str(tag["key"]): str(tag.get("value", "")) for tag in found or ()}


def _host(url: str) -> str:
    # What a person typed may hold a password.
    return url.rpartition("@")[2]


def flavours(mlmodel: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Flavours of an MLmodel file, with what it says of each."""
    found = mlmodel.get("flavors")
    for name, facts in (found if isinstance(found, dict) else {}).items():
        yield str(name), facts if isinstance(facts, dict) else {}
