"""Rectangles around what a map shows: connected pixels, the least rectangle around them, their order. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlmesh_inference.tensors import Array


def labelling() -> Any:
    """scipy.ndimage. A step asks for it when it is made: what is missing is found out when a version is loaded."""
    from scipy import ndimage  # noqa: PLC0415  only versions with boxes need it

    return ndimage


def components(chances: Array, threshold: float, *, count_max: int) -> Iterator[tuple[Array, float]]:
    """Connected parts (eight neighbours) of what is above the threshold, the largest first.

    Gives for each its outline, corners of pixels that include its convex hull, float64 [points, 2] as x, y; and the
    mean of the map over it.
    """
    ndimage = labelling()
    labels, count = ndimage.label(chances > threshold, structure=np.ones((3, 3), np.int8))
    if not count:
        return
    sizes = np.bincount(labels.ravel())[1:]
    places = ndimage.find_objects(labels)
    for index in np.argsort(-sizes, kind="stable")[:count_max]:
        rows, columns = places[index]
        mask = labels[rows, columns] == index + 1
        # The first and the last pixel of every row are enough for the hull.
        first = mask.argmax(axis=1) + columns.start
        last = columns.stop - mask[:, ::-1].argmax(axis=1)
        y = np.arange(rows.start, rows.stop)
        x = np.concatenate([first, last, first, last])
        yield (
            np.stack([x, np.concatenate([y, y, y + 1, y + 1])], axis=1).astype(np.float64),
            float(chances[rows, columns][mask].mean()),
        )


def hull(points: Array) -> Array:
    """Corners of the convex hull, in order around it (Andrew's monotone chain, 1979)."""
    ordered = sorted(map(tuple, points.tolist()))

    def half(walk: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        chain: list[tuple[float, ...]] = []
        for x, y in walk:
            while len(chain) > 1 and (chain[-1][0] - chain[-2][0]) * (y - chain[-2][1]) <= (
                chain[-1][1] - chain[-2][1]
            ) * (x - chain[-2][0]):
                chain.pop()
            chain.append((x, y))
        return chain[:-1]

    return np.array(half(ordered) + half(ordered[::-1]))


def least_rectangle(points: Array) -> Array:
    """Corners of the rectangle of least area around points, float64 [4, 2].

    One of its sides lies on a side of the convex hull (Freeman and Shapira, 1975), so all of these are tried.
    """
    around = hull(points)
    sides = np.roll(around, -1, axis=0) - around
    angles = np.unique(np.arctan2(sides[:, 1], sides[:, 0]) % (np.pi / 2))
    cosine, sine = np.cos(angles), np.sin(angles)
    turned_x = np.outer(cosine, around[:, 0]) + np.outer(sine, around[:, 1])
    turned_y = np.outer(-sine, around[:, 0]) + np.outer(cosine, around[:, 1])
    low_x, high_x = turned_x.min(axis=1), turned_x.max(axis=1)
    low_y, high_y = turned_y.min(axis=1), turned_y.max(axis=1)
    best = int(np.argmin((high_x - low_x) * (high_y - low_y)))
    x = np.array([low_x[best], high_x[best], high_x[best], low_x[best]])
    y = np.array([low_y[best], low_y[best], high_y[best], high_y[best]])
    return np.stack([cosine[best] * x - sine[best] * y, sine[best] * x + cosine[best] * y], axis=1)


def expanded(corners: Array, ratio: float) -> Array:
    """A rectangle grown on every side by area x ratio / circumference."""
    along, across = corners[1] - corners[0], corners[3] - corners[0]
    width, height = float(np.linalg.norm(along)), float(np.linalg.norm(across))
    by = width * height * ratio / (2 * (width + height))
    step_x, step_y = along / width * by, across / height * by
    grown: Array = corners + np.array([-step_x - step_y, step_x - step_y, step_x + step_y, -step_x + step_y])
    return grown


def clockwise(corners: Array) -> Array:
    """Corners of a rectangle, clockwise from the upper left one, with y downwards."""
    total, difference = corners.sum(axis=1), corners[:, 0] - corners[:, 1]
    places = [total.argmin(), difference.argmax(), total.argmax(), difference.argmin()]
    if len({int(place) for place in places}) == 4:
        return corners[places]
    # A square on its corner: by the angle about its middle.
    middle = corners - corners.mean(axis=0)
    return corners[np.argsort(np.arctan2(middle[:, 1], middle[:, 0]))]


def reading_order(boxes: Array) -> Array:
    """Indices of boxes [count, 4, 2] from top to bottom, those of one line from left to right.

    A box is of the line before it when its middle lies above that one's lower edge.
    """
    if not len(boxes):
        return np.zeros(0, np.int64)
    tops, bottoms = boxes[:, :, 1].min(axis=1), boxes[:, :, 1].max(axis=1)
    middles = (tops + bottoms) / 2
    order: list[int] = []
    line: list[int] = []
    for index in np.argsort(middles, kind="stable").tolist():
        if line and middles[index] > bottoms[line[0]]:
            order += sorted(line, key=lambda each: float(boxes[each, :, 0].min()))
            line = []
        line.append(index)
    order += sorted(line, key=lambda each: float(boxes[each, :, 0].min()))
    return np.array(order, np.int64)
