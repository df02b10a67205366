"""Pictures of a training and of what was measured, as PNG. The same values give the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlmesh_training.jobs import Calibration, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
LABELLED_CLASSES_MAX = 24
"""Beyond so many classes a confusion matrix has neither names nor counts: nobody could read them."""
_BLUE, _ORANGE, _GREY = "#1f6feb", "#d9730d", "#6e7781"
_NAME_LENGTH_MAX = 18

Floats = npt.NDArray[np.floating[Any]]


def drawn(
    evaluation: Evaluation,
    epochs: Sequence[Mapping[str, float]],
    *,
    values: Floats,
    targets: Floats,
    target_name: str = "",
) -> dict[str, bytes]:
    """PNG files by their path in the version.

    Args:
        epochs: figures at the end of each epoch, as MetricsEvent names them, and "epoch".
        values, targets: of a regression on the held-out data, in the unit of the target; of a classification not used.
    """
    pictures: dict[str, Callable[[], Figure]] = {}
    if epochs:
        pictures["learning_curves"] = lambda: learning_curves(epochs)
    if evaluation.regression is not None:
        pictures["residuals"] = lambda: residuals(values, targets, evaluation, target_name)
    else:
        pictures["confusion_matrix"] = lambda: confusion_matrix(evaluation)
        if (found := evaluation.calibration) is not None:
            pictures["reliability"] = lambda: reliability(found)
    return {f"plots/{name}.png": _png(draw) for name, draw in pictures.items()}


def learning_curves(epochs: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, and accuracy or error, over the epochs, of the training and of the validation part."""
    panels = [("loss", "Loss")]
    for name, title in (("accuracy", "Accuracy"), ("error", "Error (RMSE, normalised)")):
        if any(f"train_{name}" in epoch or f"validation_{name}" in epoch for epoch in epochs):
            panels.append((name, title))
    figure = _figure(width=4.2 * len(panels) + 0.4, height=3.8)
    shared = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, title) in zip(shared, panels, strict=True):
        for part, colour, marker in (("train", _BLUE, "o"), ("validation", _ORANGE, "s")):
            points = [(epoch["epoch"], epoch[f"{part}_{name}"]) for epoch in epochs if f"{part}_{name}" in epoch]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=part, lw=1.8, **_marks(marker, len(points)))
        axes.set(xlabel="epoch", title=title)
        _whole_numbers(axes, [epoch["epoch"] for epoch in epochs])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def confusion_matrix(evaluation: Evaluation) -> Figure:
    """Counts by true and predicted class; coloured by the share of the true class."""
    counts = np.array(evaluation.confusion, dtype=np.int64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    size = len(counts)
    readable = size <= LABELLED_CLASSES_MAX
    side = min(9.5, max(4.4, 0.52 * size + 2.0)) if readable else 7.0
    figure = _figure(width=side + 0.9, height=side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    if readable:
        names = [_name(label) for label in evaluation.labels]
        turned = max(map(len, names)) > 3
        axes.set_xticks(range(size), names, rotation=45 if turned else 0, ha="right" if turned else "center")
        axes.set_yticks(range(size), names)
        small = 10 if size <= 12 else 7
        for (row, column), count in np.ndenumerate(counts):
            if count:
                dark = shares[row, column] > 0.55
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=small, color="w" if dark else "k")
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"Confusion matrix: {evaluation.accuracy:.2%} of {evaluation.examples:,} right")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, label="share of the true class")
    return figure


def reliability(found: Calibration) -> Figure:
    """How often predictions were right against how sure they were, and how many there were of each."""
    edges = np.linspace(0, 1, len(found.bins) + 1)
    middles, width = (edges[:-1] + edges[1:]) / 2, 1 / len(found.bins)
    filled = [(middle, each) for middle, each in zip(middles, found.bins, strict=True) if each.examples]
    figure = _figure(width=5.2, height=5.6)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 1], [0, 1], color=_GREY, ls="--", lw=1.2, label="perfect", zorder=3)
    at = [middle for middle, _ in filled]
    upper.bar(
        at, [each.accuracy for _, each in filled], width=width * 0.92, color=_BLUE, alpha=0.75, label="share right"
    )
    upper.plot(
        [each.confidence for _, each in filled],
        [each.accuracy for _, each in filled],
        color=_ORANGE,
        ls="none",
        marker="o",
        ms=5,
        label="mean of the bin",
    )
    upper.set(ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1.02))
    upper.set_title(f"Reliability: ECE {found.expected_error:.3f}, MCE {found.max_error:.3f}, Brier {found.brier:.3f}")
    upper.legend(frameon=False, loc="upper left")
    lower.bar(at, [each.examples for _, each in filled], width=width * 0.92, color=_GREY)
    lower.set(xlabel="confidence", ylabel="examples")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def residuals(values: Floats, targets: Floats, evaluation: Evaluation, target_name: str) -> Figure:
    """Predictions against the truth, and how the errors are distributed."""
    errors, found = values - targets, evaluation.regression
    name = _name(target_name or "target", most=40)
    figure = _figure(width=9.0, height=4.2)
    left, right = figure.subplots(1, 2)
    low, high = float(min(values.min(), targets.min())), float(max(values.max(), targets.max()))
    margin = 0.04 * (high - low or 1.0)
    ends = (low - margin, high + margin)
    left.plot(ends, ends, color=_GREY, ls="--", lw=1.2, label="perfect")
    left.scatter(targets, values, s=16, color=_BLUE, alpha=0.65, linewidths=0)
    left.set(xlabel=f"true {name}", ylabel=f"predicted {name}", xlim=ends, ylim=ends, aspect="equal")
    left.legend(frameon=False, loc="upper left")
    right.hist(errors, bins=min(40, max(8, len(errors) // 5)), color=_BLUE, alpha=0.8)
    right.axvline(0.0, color=_GREY, ls="--", lw=1.2)
    right.axvline(float(errors.mean()), color=_ORANGE, lw=1.6, label=f"mean {errors.mean():+.3g}")
    right.set(xlabel=f"error of {name} (predicted - true)", ylabel="examples")
    right.legend(frameon=False)
    if found is not None:
        left.set_title(f"R² {found.r2:.3f}")
        right.set_title(f"RMSE {found.root_mean_squared_error:.4g}, MAE {found.mean_absolute_error:.4g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def _figure(*, width: float, height: float) -> Figure:
    # Figures by themselves: pyplot would keep them, and look for a screen.
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _png(draw: Callable[[], Figure]) -> bytes:
    import matplotlib as mpl  # noqa: PLC0415 - as above

    file = io.BytesIO()
    # A person's own settings have no part in it; a glyph that the font lacks is a box.
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mpl.rcdefaults()
        mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
        # Tight, for the layout leaves too little room beside an image with long names.
        draw().savefig(file, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
    return file.getvalue()


def _marks(marker: str, points: int) -> dict[str, Any]:
    return {"marker": marker, "ms": 4} if points <= 40 else {}


def _whole_numbers(axes: Axes, epochs: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - as above

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)


def _name(label: str, *, most: int = _NAME_LENGTH_MAX) -> str:
    """A name as it may be drawn: not too long, and no formula."""
    short = label if len(label) <= most else f"{label[: most - 1]}…"
    return short.replace("$", r"\$")


def preload() -> None:
    """Import what the pictures need, which takes a second; harmless beside a running fit."""
    import matplotlib.backends.backend_agg  # noqa: PLC0415
    import matplotlib.figure  # noqa: F401, PLC0415
