"""The registry of datasets: one entry each. Every list of datasets in this project comes from it.

Any other folder of the same layout works too, under its own name; see :func:`dataset_info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    split_by: str = ""
    reader: str = "pickles"
    metrics: str = "standard"
    mask_mode: str = ""
    each_expression: bool = False

    @property
    def counts(self) -> Mapping[str, Mapping[str, Counts]]:
        """Published sizes of the splits, by splitBy and split; see :mod:`refer.published`."""
        from refer.published import COUNTS  # checks and tables alone ask

        return COUNTS.get(self.name, {})


REFCOCO_M_FOLDERS = ("images/refcoco-m", *COCO_FOLDERS)
TRAINVAL_FOLDERS = ("images/mscoco/images/trainval2014", "images/trainval2014")
# Name, display name, image folders; then split_by, reader, metrics, mask_mode, each_expression.
DATASETS = {
    info.name: info
    for info in (
        DatasetInfo("refcoco", "RefCOCO"),
        DatasetInfo("refcoco+", "RefCOCO+"),
        DatasetInfo("refcocog", "G-Ref"),
        DatasetInfo("refclef", "RefCLEF", ("images/saiapr_tc-12",)),
        DatasetInfo(
            "grefcoco", "gRefCOCO", COCO_FOLDERS, "unc", "grefcoco", "generalised", "union"
        ),
        DatasetInfo(
            "ref-zom", "Ref-ZOM", TRAINVAL_FOLDERS, "final", "ref_zom", "zero_target", "union", True
        ),
        DatasetInfo("rrsisd", "RRSIS-D", ("images/rrsisd/JPEGImages",), "unc", mask_mode="union"),
        DatasetInfo("refsegrs", "RefSegRS", ("refsegrs/images",), "official", "txt_layout"),
        DatasetInfo("risbench", "RISBench", ("risbench/images",), "official", "txt_layout"),
        DatasetInfo(
            "refcoco-m", "RefCOCO-M", REFCOCO_M_FOLDERS, "unc", "refcoco_m", mask_mode="union"
        ),
    )
}
UNVERIFIED = {("refcocog", "google", "val")}  # expressions not checked against the files


def dataset_info(name: str) -> DatasetInfo:
    """The entry of a dataset.

    Any other name is a dataset of the user's own: of the images in its folder, or else of COCO's.
    """
    return DATASETS.get(name) or DatasetInfo(name, name, (f"{name}/images", *COCO_FOLDERS))


def published_counts(name: str, split_by: str) -> Mapping[str, Counts]:
    """Published sizes by split; empty if there are none."""
    return dataset_info(name).counts.get(split_by, {})
