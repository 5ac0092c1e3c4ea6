"""The published sizes of the data sets, to tell them from subsets and from data of one's own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Size of a split: references, sentences (None: not published) and images."""

    refs: int
    sentences: int | None
    images: int


PUBLISHED: dict[tuple[str, str], dict[str, Counts]] = {
    ("refcoco", "unc"): {
        "train": Counts(42404, 120624, 16994),
        "val": Counts(3811, 10834, 1500),
        "testA": Counts(1975, 5657, 750),
        "testB": Counts(1810, 5095, 750),
        "all": Counts(50000, 142210, 19994),
    },
    ("refcoco+", "unc"): {
        "train": Counts(42278, 120191, 16992),
        "val": Counts(3805, 10758, 1500),
        "testA": Counts(1975, 5726, 750),
        "testB": Counts(1798, 4889, 750),
        "all": Counts(49856, 141564, 19992),
    },
    ("refcocog", "umd"): {
        "train": Counts(42226, 80512, 21899),
        "val": Counts(2573, 4896, 1300),
        "test": Counts(5023, 9602, 2600),
    },
    ("refcocog", "google"): {
        "train": Counts(44822, 85474, 24698),
        "val": Counts(5000, 9536, 4650),
    },
    ("refcoco", "google"): {
        "train": Counts(40000, None, 19213),
        "val": Counts(5000, None, 4559),
        "test": Counts(5000, None, 4527),
    },
}
UNVERIFIED = {("refcocog", "google", "val")}  # its number of sentences is quoted, not confirmed
