"""Registered data sets, read from the files that the service fetched into the job's folder.

`_version.json`, which the service writes there last, says what they are: the version's name and labels. Images are a
safetensors file with the tensors "image", [examples, height, width] or [examples, channels, height, width], UINT8 or
FP32, and "target", INT64 [examples]. Tables are CSV with a header. Texts are JSONL with "text" and "label", or CSV with
these columns. Nothing here unpickles.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlmesh_training.ports import VERSION_FILE
from mlmesh_training.trainer.data import Images, Table, Texts
from mlmesh_training.trainer.reporter import PermanentError

COLUMNS_MAX = 10_000
_FIELD_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What `_version.json` says: version, labels, and the paths of the files."""

    version: str
    labels: Mapping[str, str]
    files: tuple[str, ...]


def describe(folder: Path) -> Description:
    """What the folder holds. Errors: PermanentError when nothing was fetched into it."""
    try:
        document = json.loads((folder / VERSION_FILE).read_bytes())
        return Description(
            version=str(document["version"]), labels=dict(document["labels"]), files=tuple(document["files"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PermanentError(f"the files of the registered data set are not here: {error}") from error


def images(folder: Path) -> Images:
    """Images and their classes. Errors: PermanentError."""
    known = describe(folder)
    path = _only(folder, known, ".safetensors")
    try:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - few jobs need it
    except ImportError as error:
        raise PermanentError("registered images need the package safetensors, which is not installed") from error
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            names = set(file.keys())
            if not {"image", "target"} <= names:
                raise PermanentError(f"{path.name} has the tensors {', '.join(sorted(names))}; expected image, target")
            pixels, target = file.get_tensor("image"), file.get_tensor("target")
    except SafetensorError as error:
        raise PermanentError(f"{path.name} is no safetensors file: {error}") from error
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4 or pixels.dtype.name not in {"uint8", "float32"} or pixels.shape[1] not in {1, 3}:
        raise PermanentError(
            f"image: expected UINT8 or FP32 [examples, 1 or 3, height, width], got {pixels.dtype} {pixels.shape}"
        )
    if target.ndim != 1 or target.dtype.kind not in "iu" or len(target) != len(pixels):
        raise PermanentError(f"target: expected integers [{len(pixels)}], got {target.dtype} {target.shape}")
    if not len(target) or target.min() < 0:
        raise PermanentError("target: expected indexes of classes from 0 on")
    given = known.labels.get("classes") or metadata.get("classes", "")
    labels = tuple(given.split(",")) if given else tuple(str(index) for index in range(int(target.max()) + 1))
    if int(target.max()) >= len(labels) or len(labels) < 2:
        raise PermanentError(f"target: class {int(target.max())}, but the labels are {', '.join(labels)}")
    return Images(
        pixels=pixels,
        classes=target.astype(np.int64),
        labels=labels,
        value_max=255.0 if pixels.dtype == np.uint8 else 0.0,
    )


def table(folder: Path) -> Table:
    """Rows and their target. Errors: PermanentError."""
    known = describe(folder)
    path = _only(folder, known, ".csv")
    header, rows = _csv(path)
    target = known.labels.get("target", "")
    if target not in header:
        raise PermanentError(f"{path.name} has no column {target!r} (label target); it has {', '.join(header[:50])}")
    if not rows or len(header) < 2:
        raise PermanentError(f"{path.name} has no rows, or no column beside the target")
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    found = columns.pop(target)
    return Table(names=tuple(columns), cells=tuple(columns.values()), target=found, target_name=target)


def texts(folder: Path) -> Texts:
    """Texts and the names of their classes. Errors: PermanentError."""
    known = describe(folder)
    path = _only(folder, known, ".jsonl", ".csv")
    pairs = list(_lines(path) if path.suffix == ".jsonl" else _columns(path))
    if not pairs:
        raise PermanentError(f"{path.name} holds no texts")
    return Texts(texts=tuple(text for text, _ in pairs), labels=tuple(label for _, label in pairs))


def _only(folder: Path, known: Description, *suffixes: str) -> Path:
    found = [name for name in known.files if Path(name).suffix in suffixes]
    if len(found) != 1:
        raise PermanentError(
            f"{known.version} has the files {', '.join(known.files)}; expected one {' or '.join(suffixes)}"
        )
    return folder / found[0]


def _csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows. Errors: PermanentError that names the line."""
    csv.field_size_limit(_FIELD_BYTES_MAX)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) != len(header) or not all(header) or len(header) > COLUMNS_MAX:
                raise PermanentError(f"{path.name}: the header needs different names, at most {COLUMNS_MAX}")
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise PermanentError(
                        f"{path.name}, line {reader.line_num}: {len(row)} values, the header has {len(header)}"
                    )
                if row:
                    rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise PermanentError(f"{path.name} is no CSV in UTF-8: {error}") from error
    return header, rows


def _columns(path: Path) -> Iterator[tuple[str, str]]:
    header, rows = _csv(path)
    if not {"text", "label"} <= set(header):
        raise PermanentError(f"{path.name} has the columns {', '.join(header[:50])}; expected text, label")
    text, label = header.index("text"), header.index("label")
    return ((row[text], row[label]) for row in rows)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                document: Any = json.loads(line)
                text, label = document["text"], document["label"]
            except (ValueError, KeyError, TypeError) as error:
                raise PermanentError(
                    f'{path.name}, line {number}: expected an object with "text" and "label": {error!r}'
                ) from error
            if not isinstance(text, str) or isinstance(label, dict | list):
                raise PermanentError(f"{path.name}, line {number}: text must be a string, label a string or a number")
            yield text, "" if label is None else str(label)
