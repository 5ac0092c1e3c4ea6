"""The registry of datasets: one entry each. Every list of datasets in this project comes from it.

Any other folder of the same layout works too, under its own name; see :func:`dataset_info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

COCO_FOLDERS = ("images/mscoco/images/train2014", "images/train2014")


@dataclass(frozen=True)
class Counts:
    """Published size of a split: references, expressions and images; None: not published."""

    refs: int | None
    sentences: int | None
    images: int | None


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset.

    Attributes:
        name: of its folder below the data root, the value of ``--dataset``.
        display_name: in tables.
        image_folders: below the data root; the first that exists is used.
        counts: published sizes of the splits, by splitBy and split.
        split_by: the only ``--splitBy`` that there is; '' if there are several.
        reader: module of `refer` that finds and reads its files.
        metrics: 'standard' (oIoU, mIoU, P@K), 'generalised' or 'zero_target'; the latter two are
            in :mod:`lib.evaluation.generalised`.
        mask_mode: of its masks, whatever ``--mask_mode`` says; '' to follow it.
        each_expression: whether an epoch of training has every expression, not one a reference.
    """

    name: str
    display_name: str
    image_folders: tuple[str, ...] = COCO_FOLDERS
    counts: Mapping[str, Mapping[str, Counts]] = field(default_factory=dict)
    split_by: str = ""
    reader: str = "pickles"
    metrics: str = "standard"
    mask_mode: str = ""
    each_expression: bool = False


DATASETS = {
    info.name: info
    for info in (
        DatasetInfo(
            "refcoco",
            "RefCOCO",
            counts={
                "unc": {
                    "train": Counts(42404, 120624, 16994),
                    "val": Counts(3811, 10834, 1500),
                    "testA": Counts(1975, 5657, 750),
                    "testB": Counts(1810, 5095, 750),
                    "all": Counts(50000, 142210, 19994),
                },
                "google": {
                    "train": Counts(40000, None, 19213),
                    "val": Counts(5000, None, 4559),
                    "test": Counts(5000, None, 4527),
                },
            },
        ),
        DatasetInfo(
            "refcoco+",
            "RefCOCO+",
            counts={
                "unc": {
                    "train": Counts(42278, 120191, 16992),
                    "val": Counts(3805, 10758, 1500),
                    "testA": Counts(1975, 5726, 750),
                    "testB": Counts(1798, 4889, 750),
                    "all": Counts(49856, 141564, 19992),
                }
            },
        ),
        DatasetInfo(
            "refcocog",
            "G-Ref",
            counts={
                "umd": {
                    "train": Counts(42226, 80512, 21899),
                    "val": Counts(2573, 4896, 1300),
                    "test": Counts(5023, 9602, 2600),
                },
                "google": {
                    "train": Counts(44822, 85474, 24698),
                    "val": Counts(5000, 9536, 4650),
                },
            },
        ),
        DatasetInfo("refclef", "RefCLEF", image_folders=("images/saiapr_tc-12",)),
        DatasetInfo(
            "grefcoco",
            "gRefCOCO",
            counts={
                "unc": {"train": Counts(None, 209344, None), "all": Counts(None, 259859, None)}
            },
            split_by="unc",
            reader="grefcoco",
            metrics="generalised",
            mask_mode="union",
        ),
        DatasetInfo(
            "ref-zom",
            "Ref-ZOM",
            image_folders=("images/mscoco/images/trainval2014", "images/trainval2014"),
            split_by="final",
            reader="ref_zom",
            metrics="zero_target",
            mask_mode="union",
            each_expression=True,
        ),
        DatasetInfo(
            "rrsisd",
            "RRSIS-D",
            image_folders=("images/rrsisd/JPEGImages",),
            counts={
                "unc": {
                    "train": Counts(12181, 12181, None),
                    "val": Counts(1740, 1740, None),
                    "test": Counts(3481, 3481, None),
                    "all": Counts(17402, 17402, None),
                }
            },
            split_by="unc",
            mask_mode="union",
        ),
        DatasetInfo(
            "refsegrs",
            "RefSegRS",
            image_folders=("refsegrs/images",),
            counts={
                "official": {
                    "train": Counts(2172, 2172, None),
                    "val": Counts(431, 431, None),
                    "test": Counts(1817, 1817, None),
                    "all": Counts(4420, 4420, None),
                }
            },
            split_by="official",
            reader="txt_layout",
        ),
        DatasetInfo(
            "risbench",
            "RISBench",
            image_folders=("risbench/images",),
            counts={"official": {"all": Counts(52472, 52472, None)}},
            split_by="official",
            reader="txt_layout",
        ),
        DatasetInfo(
            "refcoco-m",
            "RefCOCO-M",
            image_folders=("images/refcoco-m", *COCO_FOLDERS),
            counts={"unc": {"val": Counts(2080, 5598, 1190)}},
            split_by="unc",
            reader="refcoco_m",
            mask_mode="union",
        ),
    )
}
UNVERIFIED = {("refcocog", "google", "val")}  # expressions not checked against the files


def dataset_info(name: str) -> DatasetInfo:
    """The entry of a dataset; any other name is a dataset of the user's own, of COCO images."""
    return DATASETS.get(name) or DatasetInfo(name, name)


def published_counts(name: str, split_by: str) -> Mapping[str, Counts]:
    """Published sizes by split; empty if there are none."""
    return dataset_info(name).counts.get(split_by, {})
