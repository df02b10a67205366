"""What can be trained here, on what, and what each hyperparameter may be. Pure, but for a look at what is installed.

Other distributions bring recipes by an entry point of the group "mlmesh.recipes". Its value is a `Recipe`; loading it
must be cheap, for the service does that. The code of the training, `Recipe.definition`, is loaded by training processes
alone. No code ever comes over the wire.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

from mlmesh_runtime.errors import FieldViolation, InvalidInput
from mlmesh_training.datasets import DATASETS, DatasetKind
from mlmesh_training.jobs import JobSpec

logger = logging.getLogger(__name__)

ENTRY_POINTS = "mlmesh.recipes"
DISTRIBUTION = "mlmesh"
FITTING = frozenset({"epochs", "batch_size", "learning_rate"})
"""Hyperparameters that the fitting reads of every recipe; it also reads weight_decay where a recipe has it."""

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_HYPERPARAMETER = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DEFINITION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Task(enum.StrEnum):
    """What a recipe's models are for; names as in the contract."""

    CLASSIFICATION = "CLASSIFICATION"
    REGRESSION = "REGRESSION"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """One setting of a recipe, with its default and inclusive bounds.

    `log_scale`: a search should go over it on a logarithmic scale; then `low` is above 0.
    """

    name: str
    description: str
    default: float
    low: float
    high: float
    integer: bool = False
    log_scale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A kind of training.

    Attributes:
        datasets: named data sets that it takes.
        dataset_kind: registered data sets that it takes are of this kind.
        definition: "module:attribute" of a `mlmesh_training.trainer.definition.Definition`.
        distribution: what brings it, such as "mlmesh 0.1.0"; filled in when it is found.
    """

    name: str
    description: str
    task: Task
    dataset_kind: DatasetKind
    hyperparameters: tuple[Hyperparameter, ...]
    definition: str
    datasets: tuple[str, ...] = ()
    distribution: str = ""


def fitting(
    *, epochs: int, learning_rate: float, batch_size: int = 64, weight_decay: float = 1e-4, dropout: float = 0.1
) -> tuple[Hyperparameter, ...]:
    """What every recipe of ours has, with these defaults."""
    return (
        Hyperparameter(
            name="epochs", description="Times over the training data.", default=epochs, low=1, high=500, integer=True
        ),
        Hyperparameter(
            name="batch_size",
            description="Examples a step.",
            default=batch_size,
            low=2,
            high=1024,
            integer=True,
            log_scale=True,
        ),
        Hyperparameter(
            name="learning_rate",
            description="Peak of the schedule.",
            default=learning_rate,
            low=1e-6,
            high=1.0,
            log_scale=True,
        ),
        Hyperparameter(
            name="weight_decay", description="Decoupled weight decay of AdamW.", default=weight_decay, low=0, high=1
        ),
        Hyperparameter(
            name="dropout",
            description="Share of features dropped before the last layer.",
            default=dropout,
            low=0.0,
            high=0.9,
        ),
    )


SMOOTHING = Hyperparameter(
    name="label_smoothing", description="Share of the target given to all classes.", default=0, low=0, high=0.5
)


def _shift(default: int) -> Hyperparameter:
    return Hyperparameter(
        name="shift",
        description="Training images are moved at random by up to this many pixels.",
        default=default,
        low=0,
        high=4,
        integer=True,
    )


def _layers(width: int, depth: int) -> tuple[Hyperparameter, ...]:
    return (
        Hyperparameter(
            name="width",
            description="Units a hidden layer.",
            default=width,
            low=4,
            high=2048,
            integer=True,
            log_scale=True,
        ),
        Hyperparameter(name="depth", description="Hidden layers.", default=depth, low=1, high=8, integer=True),
    )


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="cnn",
                description="Convolutional network of three blocks for small images.",
                task=Task.CLASSIFICATION,
                dataset_kind=DatasetKind.IMAGE,
                datasets=("digits", "mnist"),
                hyperparameters=(
                    *fitting(epochs=5, learning_rate=0.01),
                    SMOOTHING,
                    _shift(1),
                    Hyperparameter(
                        name="width",
                        description="Channels of the first block; each further block has twice as many.",
                        default=16,
                        low=2,
                        high=128,
                        integer=True,
                        log_scale=True,
                    ),
                ),
                definition="mlmesh_training.trainer.images:cnn",
            ),
            Recipe(
                name="mlp",
                description="Fully connected network for small images.",
                task=Task.CLASSIFICATION,
                dataset_kind=DatasetKind.IMAGE,
                datasets=("digits", "mnist"),
                hyperparameters=(
                    *fitting(epochs=10, learning_rate=0.005, dropout=0.2),
                    SMOOTHING,
                    _shift(0),
                    *_layers(width=128, depth=2),
                ),
                definition="mlmesh_training.trainer.images:mlp",
            ),
            Recipe(
                name="text",
                description="Classifier of texts: the MiniLM sentence encoder, fine-tuned (extra: mlmesh[text]).",
                task=Task.CLASSIFICATION,
                dataset_kind=DatasetKind.TEXT,
                datasets=("utterances",),
                hyperparameters=(
                    *fitting(epochs=4, learning_rate=5e-4, batch_size=16, weight_decay=0.01),
                    SMOOTHING,
                    Hyperparameter(
                        name="frozen_layers",
                        description="Layers of the encoder, from the first, that stay as they are; 0 tunes all "
                        "and its word vectors, too.",
                        default=4,
                        low=0,
                        high=6,
                        integer=True,
                    ),
                    Hyperparameter(
                        name="tokens_max",
                        description="Texts are cut to so many tokens.",
                        default=64,
                        low=8,
                        high=512,
                        integer=True,
                        log_scale=True,
                    ),
                ),
                definition="mlmesh_training.trainer.texts:minilm",
            ),
            Recipe(
                name="tabular",
                description="Classifier of rows of numbers and categories: a fully connected network.",
                task=Task.CLASSIFICATION,
                dataset_kind=DatasetKind.TABULAR,
                datasets=("breast-cancer", "iris", "wine"),
                hyperparameters=(
                    *fitting(epochs=30, learning_rate=0.01, batch_size=32),
                    SMOOTHING,
                    *_layers(width=64, depth=2),
                ),
                definition="mlmesh_training.trainer.tables:classifier",
            ),
            Recipe(
                name="regression",
                description="A number from rows of numbers and categories: a fully connected network.",
                task=Task.REGRESSION,
                dataset_kind=DatasetKind.TABULAR,
                datasets=("diabetes",),
                hyperparameters=(
                    *fitting(epochs=20, learning_rate=0.003, batch_size=32, weight_decay=0.01),
                    *_layers(width=16, depth=1),
                ),
                definition="mlmesh_training.trainer.tables:regressor",
            ),
        )
    }
)


@functools.cache
def known() -> Mapping[str, Recipe]:
    """All recipes of this installation by name, ours and those of other distributions. Looked up once a process."""
    return discover(metadata.entry_points(group=ENTRY_POINTS))


def discover(found: Iterable[metadata.EntryPoint]) -> Mapping[str, Recipe]:
    """Our recipes and those of these entry points. What is wrong with one is logged, and it is left out."""
    recipes = {
        name: dataclasses.replace(recipe, distribution=_distribution(DISTRIBUTION)) for name, recipe in RECIPES.items()
    }
    for point in sorted(found, key=lambda point: (point.name, point.value)):
        brought = f"{point.dist.name} {point.dist.version}" if point.dist else ""
        try:
            recipe = _loaded(point, taken=recipes)
        except Exception as error:  # whatever their code does, ours goes on
            logger.warning(
                "a recipe is left out",
                extra={"entry_point": f"{point.name} = {point.value}", "distribution": brought, "error": str(error)},
            )
        else:
            recipes[recipe.name] = dataclasses.replace(recipe, distribution=brought)
    return MappingProxyType(recipes)


def _loaded(point: metadata.EntryPoint, *, taken: Mapping[str, Recipe]) -> Recipe:
    if point.name in taken:
        raise ValueError(f"there is a recipe {point.name!r} of {taken[point.name].distribution} already")
    recipe = point.load()
    if not isinstance(recipe, Recipe):
        raise TypeError(f"its value is a {type(recipe).__name__}, expected mlmesh_training.recipes.Recipe")
    if recipe.name != point.name or not _NAME.fullmatch(recipe.name):
        raise ValueError(f"recipe {recipe.name!r} must be named as its entry point, in the form {_NAME.pattern}")
    if not _DEFINITION.fullmatch(recipe.definition):
        raise ValueError(f"definition: expected 'module:attribute', got {recipe.definition!r}")
    names = [each.name for each in recipe.hyperparameters]
    if missing := FITTING - set(names):
        raise ValueError(f"hyperparameters: {', '.join(sorted(missing))} missing")
    if len(set(names)) != len(names):
        raise ValueError("hyperparameters: a name is given twice")
    for each in recipe.hyperparameters:
        if not _HYPERPARAMETER.fullmatch(each.name):
            raise ValueError(f"hyperparameter {each.name!r}: names have the form {_HYPERPARAMETER.pattern}")
        if complaint := _complaint(each, each.default):
            raise ValueError(f"default of {each.name}: {complaint}")
        if each.log_scale and each.low <= 0:
            raise ValueError(f"{each.name}: a logarithmic scale needs a least value above 0, got {each.low:g}")
    Task(recipe.task), DatasetKind(recipe.dataset_kind)
    return recipe


def _distribution(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


def resolve(spec: JobSpec) -> Mapping[str, float]:
    """Check a spec and return all hyperparameters of its recipe, defaults filled in.

    Errors: InvalidInput with reason UNKNOWN_RECIPE, UNKNOWN_DATASET or INVALID_FIELD; it names every field at fault.
    Whether a registered data set exists is not known here.
    """
    recipe = known().get(spec.recipe)
    if recipe is None:
        raise InvalidInput(
            f"no recipe {spec.recipe!r}; there are {', '.join(known())}", field="spec.recipe", reason="UNKNOWN_RECIPE"
        )
    if not spec.registered_dataset and spec.dataset not in recipe.datasets:
        kind = recipe.dataset_kind.lower()
        raise InvalidInput(
            f"recipe {recipe.name!r} takes no data set {spec.dataset!r}; it takes "
            f"{', '.join([*recipe.datasets, f'registered {kind} data sets (models/…/versions/…)'])}",
            field="spec.dataset",
            reason="UNKNOWN_DATASET",
        )
    wrong = [*_unknown(recipe, spec.hyperparameters)]
    values: dict[str, float] = {}
    for each in recipe.hyperparameters:
        value = spec.hyperparameters.get(each.name, each.default)
        if complaint := _complaint(each, value):
            wrong.append(_violation(each.name, complaint))
        values[each.name] = value
    dataset = None if spec.registered_dataset else DATASETS.get(spec.dataset)
    if not wrong and dataset and values["batch_size"] > dataset.training_examples:
        most = dataset.training_examples
        wrong.append(_violation("batch_size", f"{values['batch_size']:g} is more than the {most} training examples"))
    if spec.publication and len(set(spec.publication.aliases)) != len(spec.publication.aliases):
        wrong.append(FieldViolation(field="spec.publication.aliases", description="an alias is given twice"))
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidInput(text, field=wrong[0].field, violations=wrong)
    return MappingProxyType(values)


def _unknown(recipe: Recipe, given: Mapping[str, float]) -> list[FieldViolation]:
    names = [each.name for each in recipe.hyperparameters]
    return [
        _violation(name[:64], f"recipe {recipe.name!r} has no such hyperparameter; it has {', '.join(names)}")
        for name in sorted(given)
        if name not in names
    ]


def _complaint(each: Hyperparameter, value: float) -> str:
    if not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if not each.low <= value <= each.high:
        return f"must be from {each.low:g} to {each.high:g}, got {value:g}"
    if each.integer and value != int(value):
        return f"must be a whole number, got {value:g}"
    return ""


def _violation(name: str, description: str) -> FieldViolation:
    return FieldViolation(field=f"spec.hyperparameters[{name!r}]", description=description)
