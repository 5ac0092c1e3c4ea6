"""Group samples by object size, expression length and so on, and average their IoU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import stats

from tools.report.records import Prediction

# Words for an object's location, except for those that mostly mean something else:
# "up" and "down" (standing, sitting), "far" and "near" ("far left", "near the window").
LOCATION_WORDS = {
    "left": ("left", "leftmost", "lft"),
    "right": ("right", "rightmost", "rt"),
    "top": ("top", "topmost", "upper", "uppermost", "highest", "higher", "above"),
    "bottom": ("bottom", "bottommost", "lower", "lowest", "below", "under", "beneath", "btm"),
    "middle": ("middle", "mid", "center", "centre", "central", "between", "ctr"),
    "front": ("front", "foreground", "closest", "closer", "nearest"),
    "back": ("back", "background", "behind", "rear"),
}
SIZE_EDGES = (0.0, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 100.0)  # percent of the image
LENGTHS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 7), (8, 10), (11, 15), (16, None))
MANY = 5  # this many other objects of the category, or more, share a group


@dataclass(frozen=True)
class Breakdown:
    """A way to group samples; a sample may be in several groups or in none.

    Attributes:
        key: short name.
        title: what the groups differ in.
        axis: of the chart, with the unit.
        note: how to read it.
        labels: of the G groups, short.
        members: (N, G) bool.
    """

    key: str
    title: str
    axis: str
    note: str
    labels: tuple[str, ...]
    members: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mean:
    """Mean of a group.

    Attributes:
        n: number of samples.
        value: nan for none.
        low, high: 95 % confidence interval, not clipped; nan for fewer than two objects.
    """

    n: int
    value: float
    low: float
    high: float


def mean_with_interval(values: npt.NDArray[np.float64], objects: npt.NDArray[np.int64]) -> Mean:
    """Mean and its 95 % interval.

    Expressions of one object tend to succeed or fail together, so the objects, not the samples,
    are taken as independent: Student's t interval with the cluster-robust standard error.

    Args:
        values: (N,).
        objects: (N,), equal for samples about the same object.
    """
    n = len(values)
    if not n:
        return Mean(0, float("nan"), float("nan"), float("nan"))
    mean = float(values.mean())
    codes = np.unique(objects, return_inverse=True)[1]
    count = int(codes.max()) + 1
    if count < 2:
        return Mean(n, mean, float("nan"), float("nan"))
    sums = np.bincount(codes, values - mean)
    error = np.sqrt((sums**2).sum() * count / (count - 1)) / n
    half = float(error * stats.t.ppf(0.975, count - 1))
    return Mean(n, mean, mean - half, mean + half)


def object_codes(samples: Sequence[Prediction]) -> npt.NDArray[np.int64]:
    """(N,), equal for samples about the same object."""
    codes = {key: i for i, key in enumerate(sorted({s.object for s in samples}))}
    return np.array([codes[s.object] for s in samples], dtype=np.int64)


def breakdowns(samples: Sequence[Prediction]) -> list[Breakdown]:
    """All groupings: object size, expression length, location words, same category."""
    return [
        _by_size(samples),
        _by_length(samples),
        _by_location(samples),
        _by_same_category(samples),
    ]


def _one_hot(group: npt.NDArray[np.int64], groups: int) -> npt.NDArray[np.bool_]:
    return group[:, None] == np.arange(groups)


def _by_size(samples: Sequence[Prediction]) -> Breakdown:
    covered = np.array([100 * s.truth.area / (s.height * s.width) for s in samples])
    labels = [f"{a:g}-{b:g}" for a, b in pairwise(SIZE_EDGES)]
    labels[0], labels[-1] = f"< {SIZE_EDGES[1]:g}", f"≥ {SIZE_EDGES[-2]:g}"
    group = np.digitize(covered, SIZE_EDGES[1:-1])
    return Breakdown(
        "size",
        "Object size",
        "ground truth mask, % of the image",
        "A group includes its lower limit, not its upper.",
        tuple(labels),
        _one_hot(group, len(labels)),
    )


def words(expression: str) -> list[str]:
    """Words of an expression, without the bar between averaged expressions."""
    return [word for word in expression.split() if word != "|"]


def _by_length(samples: Sequence[Prediction]) -> Breakdown:
    labels = [f"{a}+" if b is None else str(a) if a == b else f"{a}-{b}" for a, b in LENGTHS]
    length = np.array([len(words(s.sentence)) for s in samples])
    group = np.digitize(length, [a for a, _ in LENGTHS[1:]])
    return Breakdown(
        "length",
        "Expression length",
        "words",
        "Words are separated by spaces; an empty expression counts as one word.",
        tuple(labels),
        _one_hot(group, len(labels)),
    )


def locations(expression: str) -> set[str]:
    """Keys of `LOCATION_WORDS` that an expression mentions."""
    mentioned = set(re.findall(r"[a-z]+", expression.casefold()))
    return {key for key, names in LOCATION_WORDS.items() if mentioned & set(names)}


def _by_location(samples: Sequence[Prediction]) -> Breakdown:
    keys = [locations(s.sentence) for s in samples]
    columns = [[not k for k in keys], [bool(k) for k in keys]]
    columns += [[key in k for k in keys] for key in LOCATION_WORDS]
    listed = "; ".join(f"{key}: {', '.join(names)}" for key, names in LOCATION_WORDS.items())
    return Breakdown(
        "location",
        "Location words",
        "word in the expression",
        f"An expression may be in several groups. {listed}.",
        ("none", "any", *LOCATION_WORDS),
        np.array(columns, dtype=bool).T,
    )


def _by_same_category(samples: Sequence[Prediction]) -> Breakdown:
    others = np.minimum([s.same_category for s in samples], MANY)
    return Breakdown(
        "same_category",
        "Objects of the same category",
        "other objects of the category in the image",
        "0: the object is the only one of its category that is annotated.",
        (*map(str, range(MANY)), f"{MANY}+"),
        _one_hot(others, MANY + 1),
    )
