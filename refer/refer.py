"""The REFER data API: which expression refers to which objects of which image.

Written for the file layout in refer/README.md; the class, its methods and attributes have the
published names.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.errors import InputError
from refer.arrays import Arrays
from refer.datasets import COCO_FOLDERS, DATASETS, dataset_info
from refer.images import MAX_PIXELS, open_rgb
from refer.instances import Record
from refer.masks import MAX_POLYGON, UInt8Array, draw_components
from refer.pickles import Ref

HELP = "see refer/README.md"
# Attributes of `REFER` that are dropped when its arrays are made, and read again on access.
RECORDS = {"data", "Refs", "Anns", "Imgs", "Cats", "Sents", "imgToRefs", "imgToAnns", "catToRefs"}
RECORDS |= {"refToAnn", "refToAnns", "annToRef", "sentToRef", "sentToTokens"}

Ids = int | Iterable[int]


class REFER:
    """The references of one dataset, indexed.

    Args:
        data_root: folder with the datasets' folders.
        dataset: a name in :data:`refer.datasets.DATASETS`, or another folder of the same layout.
        splitBy: who made the splits: unc, umd, google, berkeley; part of the pickle's name. Of no
            effect where there is one only.
        image_root: folder of the images, or the one above `train2014`; by default the first of
            the dataset's image folders that exists.
        max_pixels: upper limit of an image's size.

    Attributes:
        data: {'dataset', 'refs', 'images', 'annotations', 'categories'} as read.
        Refs, Anns, Imgs: record by id. Cats: name by id.
        Sents: expression record by sent_id.
        imgToRefs, imgToAnns: lists by image_id. catToRefs: lists by category_id.
        refToAnns: list of annotations by ref_id, of any length.
        refToAnn: annotation by ref_id, of references with exactly one.
        annToRef: reference by ann_id (the last one).
        sentToRef, sentToTokens: by sent_id.
        IMAGE_DIR: folder of the images.

    Raises:
        InputError: a file is missing or damaged, or a reference's annotation or image is.
    """

    data: dict[str, Any]
    Refs: dict[int, Ref]
    Anns: dict[int, Record]
    Imgs: dict[int, Record]
    Cats: dict[int, str]
    Sents: dict[int, Record]
    imgToRefs: dict[int, list[Ref]]
    imgToAnns: dict[int, list[Record]]
    catToRefs: dict[int, list[Ref]]
    refToAnn: dict[int, Record]
    refToAnns: dict[int, list[Record]]
    annToRef: dict[int, Ref]
    sentToRef: dict[int, Ref]
    sentToTokens: dict[int, list[str]]

    def __init__(
        self,
        data_root: str | Path,
        dataset: str = "refcoco",
        splitBy: str = "unc",
        image_root: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.ROOT_DIR = Path(data_root)
        self.DATA_DIR = _dataset_folder(self.ROOT_DIR, dataset)
        self.dataset = dataset
        self.info = dataset_info(dataset)
        self.splitBy = self.info.split_by or splitBy
        self.max_pixels = max_pixels
        self.IMAGE_DIR = image_folder(self.ROOT_DIR, dataset, image_root)
        self._files: tuple[Path, Path] = self._layout.find(self.DATA_DIR, self.splitBy)
        if not os.path.exists(self._files[1]):
            raise InputError(f"{self._files[1]} does not exist; {HELP}")
        self._arrays: Arrays | None = None
        self._finder: Any = None  # of refer/names.py, once it is needed
        # Whether a resized image was warned of, by any of the loader processes.
        self._warned = torch.zeros(1, dtype=torch.bool).share_memory_()
        self._read()

    def _read(self) -> None:
        """Read, check and index the records."""
        pickle_path, instances_path = self._files
        self.data = {"dataset": self.dataset}
        with _no_garbage_collection():
            self.data |= self._layout.read(self._files, self.max_pixels)
            self._index_instances(instances_path)
            self._index_refs(self.data["refs"], pickle_path)

    @property
    def _layout(self) -> Any:
        """The module that finds and reads the files, and may draw segmentations of its own."""
        return importlib.import_module(f"refer.{self.info.reader}")

    def __getattr__(self, name: str) -> Any:
        if name not in RECORDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._read()
        return self.__dict__[name]

    @property
    def image_source(self) -> str:
        """Whose ids the images have: 'COCO', or the name of a dataset with images of its own."""
        folders = [str(self.IMAGE_DIR)] if self.dataset not in DATASETS else self.info.image_folders
        return "COCO" if folders[-1].endswith("2014") else self.dataset

    @property
    def arrays(self) -> Arrays:
        """The records as arrays, for training and evaluation.

        The first access drops the records, which take far more memory; they are read again when
        they are used. Arrays do not follow changes of records.
        """
        if self._arrays is None:
            with _no_garbage_collection():
                refs = self.data["refs"]
                self._arrays = Arrays.pack(refs, self.Imgs, self.Anns, self.Cats)
                del refs
                for name in RECORDS & self.__dict__.keys():
                    delattr(self, name)
        return self._arrays

    def __repr__(self) -> str:
        return f"{self.dataset}({self.splitBy})"

    def _index_instances(self, path: Path) -> None:
        self.Imgs = _by_id(self.data["images"], "id", "image", path)
        self.Anns = _by_id(self.data["annotations"], "id", "annotation", path)
        self.Cats = {c["id"]: c["name"] for c in self.data["categories"]}
        self.imgToAnns = {}
        for ann in self.data["annotations"]:
            self.imgToAnns.setdefault(ann["image_id"], []).append(ann)

    def _index_refs(self, refs: list[Ref], path: Path) -> None:
        self.Refs = _by_id(refs, "ref_id", "reference", path)
        for ref in refs:
            missing = [ann_id for ann_id in ref["ann_ids"] if ann_id not in self.Anns]
            if missing:
                raise InputError(
                    f"{path}: reference {ref['ref_id']} is of annotation {missing[0]}, which "
                    f"{self.DATA_DIR / 'instances.json'} does not have; {HELP}"
                )
            if ref["image_id"] not in self.Imgs:
                raise InputError(
                    f"{path}: reference {ref['ref_id']} is in image {ref['image_id']}, which "
                    f"{self.DATA_DIR / 'instances.json'} does not have; {HELP}"
                )
        self.imgToRefs, self.catToRefs, self.annToRef = {}, {}, {}
        self.refToAnn, self.refToAnns = {}, {}
        self.Sents, self.sentToRef, self.sentToTokens = {}, {}, {}
        for ref in refs:
            self.imgToRefs.setdefault(ref["image_id"], []).append(ref)
            self.catToRefs.setdefault(ref["category_id"], []).append(ref)
            annotations = [self.Anns[ann_id] for ann_id in ref["ann_ids"]]
            self.refToAnns[ref["ref_id"]] = annotations
            if len(annotations) == 1:
                self.refToAnn[ref["ref_id"]] = annotations[0]
            self.annToRef |= dict.fromkeys(ref["ann_ids"], ref)
            for sentence in ref["sentences"]:
                sent_id = sentence["sent_id"]
                self.Sents[sent_id] = sentence
                self.sentToRef[sent_id] = ref
                self.sentToTokens[sent_id] = sentence["tokens"]

    def splits(self) -> list[str]:
        """Names that `getRefIds(split=...)` takes here, in the order train, val, test."""
        labels = {ref["split"] for ref in self.data["refs"]}
        names = {label for label in labels if "test" not in label}
        tests = [label for label in labels if "test" in label]
        letters = {letter for label in tests for letter in label.partition("test")[2]}
        names |= {f"test{letter}" for letter in letters} or ({"test"} if tests else set())
        order = {"train": 0, "val": 1}
        return sorted(names, key=lambda name: (order.get(name, 2), name))

    def no_split(self, split: str) -> InputError:
        """The error to raise if no reference is in a split."""
        return InputError(
            f"{self!r} has no split '{split}'; choose from {', '.join(self.splits()) or 'none'}"
        )

    def getRefIds(
        self,
        image_ids: Ids = (),
        cat_ids: Ids = (),
        ref_ids: Ids = (),
        split: str = "",
    ) -> list[int]:
        """Ids of the references that meet every given condition, in the pickle's order.

        Args:
            image_ids: of these images.
            cat_ids: of these categories.
            ref_ids: among these.
            split: '' for all; 'testA' means the letter A occurs in the reference's split
                ('testAB' is in both), 'test' that it contains 'test', all else equality.

        Returns:
            List of ref_id.

        Raises:
            InputError: the dataset has no reference in this split.
        """
        refs: list[Ref] = self.data["refs"]
        if split:
            refs = [ref for ref in refs if in_split(ref["split"], split)]
            if not refs:
                raise self.no_split(split)
        images, cats, among = _ids(image_ids), _ids(cat_ids), _ids(ref_ids)
        if images and not split:
            refs = [ref for image in images for ref in self.imgToRefs.get(image, [])]
        wanted = {"image_id": set(images), "category_id": set(cats), "ref_id": set(among)}
        for key, values in wanted.items():
            if values:
                refs = [ref for ref in refs if ref[key] in values]
        return [ref["ref_id"] for ref in refs]

    def getAnnIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = ()) -> list[int]:
        """Ids of the annotations of the given images, categories and references."""
        images, cats, refs = _ids(image_ids), set(_ids(cat_ids)), _ids(ref_ids)
        anns: list[Record] = self.data["annotations"]
        if images:
            anns = [ann for image in images for ann in self.imgToAnns.get(image, [])]
        if cats:
            anns = [ann for ann in anns if ann.get("category_id") in cats]
        if refs:
            referred = {i for ref in refs for i in self._get(self.Refs, ref, "ref_id")["ann_ids"]}
            anns = [ann for ann in anns if ann["id"] in referred]
        return [ann["id"] for ann in anns]

    def getImgIds(self, ref_ids: Ids = ()) -> list[int]:
        """Ids of the images of the given references, each once; of all images by default."""
        refs = _ids(ref_ids)
        if not refs:
            return list(self.Imgs)
        return list(dict.fromkeys(self._get(self.Refs, ref, "ref_id")["image_id"] for ref in refs))

    def getCatIds(self) -> list[int]:
        """Ids of the categories."""
        return list(self.Cats)

    def loadRefs(self, ref_ids: Ids | None = None) -> list[Ref]:
        """References by ref_id; all of them by default."""
        return self._load(self.Refs, ref_ids, "ref_id")

    def loadAnns(self, ann_ids: Ids | None = None) -> list[Record]:
        """Annotations by id; all of them by default."""
        return self._load(self.Anns, ann_ids, "ann_id")

    def loadImgs(self, image_ids: Ids | None = None) -> list[Record]:
        """Image records by id; all of them by default."""
        return self._load(self.Imgs, image_ids, "image_id")

    def loadCats(self, cat_ids: Ids | None = None) -> list[str]:
        """Category names by id; all of them by default."""
        return self._load(self.Cats, cat_ids, "category_id")

    def getRefBox(self, ref_id: int) -> list[float]:
        """Bounding box [x, y, width, height] in pixels: the one annotation's, else the mask's."""
        ref = self._get(self.Refs, ref_id, "ref_id")
        annotations = self.refToAnns[ref_id]
        box = annotations[0].get("bbox") if len(annotations) == 1 else None
        if isinstance(box, list) and len(box) == 4 and all(map(_is_coordinate, box)):
            return box.copy()
        ys, xs = np.nonzero(self.getMask(ref)["mask"])
        if not len(xs):
            return [0.0, 0.0, 0.0, 0.0]
        x, y = float(xs.min()), float(ys.min())
        return [x, y, float(xs.max()) - x + 1, float(ys.max()) - y + 1]

    def getMask(self, ref: Ref) -> dict[str, Any]:
        """Draw a reference's objects.

        Args:
            ref: from `loadRefs`.

        Returns:
            {'mask': (H, W) uint8, for each pixel the largest number of components of one
            annotation that cover it (above 1 where its components overlap), 'area': the mask's
            sum}.

        Raises:
            InputError: an annotation has no polygons, or damaged ones.
        """
        image = self.Imgs[ref["image_id"]]
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in self.refToAnns[ref["ref_id"]]:
            where = f"{self!r}: annotation {annotation['id']} of reference {ref['ref_id']}"
            drawn = self.draw(annotation.get("segmentation"), *mask.shape, where)
            np.maximum(mask, drawn, out=mask)
        return {"mask": mask, "area": int(mask.sum())}

    def draw(self, segmentation: Any, height: int, width: int, where: str) -> UInt8Array:
        """Draw an annotation of this dataset; see :func:`refer.masks.draw_components`."""
        draw = getattr(self._layout, "draw", draw_components)
        return draw(segmentation, height, width, where)

    def image_path(self, image_id: int) -> Path:
        """Path of an image's file, which need not exist.

        It is named as on record, or a little otherwise; see :class:`refer.names.Finder`.

        Raises:
            InputError: the file's name, or a symbolic link in the folder, leads out of the
                image folder. The folder itself may be a link.
        """
        name, _ = self._file(image_id)
        path = self.IMAGE_DIR / name
        if set(name).isdisjoint("/\\:") and os.path.isfile(path) and not os.path.islink(path):
            return path
        where = f"{self.DATA_DIR / 'instances.json'}, image {image_id}"
        return self._names().path(name, where)

    def _file(self, image_id: int) -> tuple[str, tuple[int, int]]:
        """Name of an image's file, and its width and height, as on record."""
        row = None if self._arrays is None else self._arrays.image_row(image_id)
        if self._arrays is None or row is None:
            record = self._get(self.Imgs, image_id, "image_id")
            return record["file_name"], (record["width"], record["height"])
        size = int(self._arrays.width[row]), int(self._arrays.height[row])
        return self._arrays.file_name[row], size

    def _names(self) -> Any:
        if self._finder is None:
            from refer.names import Finder

            arrays = self._arrays
            records = arrays.file_name if arrays else [i["file_name"] for i in self.Imgs.values()]
            self._finder = Finder(self.IMAGE_DIR, records)
        return self._finder

    def open_image(self, image_id: int) -> Image.Image:
        """Open an image as RGB, as large as it is in its file.

        A copy of another size is warned of once: masks have the size on record.

        Raises:
            InputError: missing, damaged, too large, or of another shape than on record.
        """
        path = self.image_path(image_id)
        if not os.path.isfile(path):
            raise InputError(self.missing_image(path))
        image = open_rgb(path, self.max_pixels)
        _, size = self._file(image_id)
        if image.size != size:
            from refer.rare_images import check_fit

            check_fit(image, path, size, self._warned)
        return image

    def missing_image(self, path: Path) -> str:
        """The message for a missing image, or for its missing folder."""
        if not os.path.isdir(self.IMAGE_DIR):
            return (
                f"image folder {self.IMAGE_DIR} of {self!r} does not exist; put the images there "
                f"or give their folder with --image_root, {HELP}"
            )
        tried = self._names().tried(os.path.relpath(path, self.IMAGE_DIR))
        others = [self.ROOT_DIR / folder for folder in self.info.image_folders]
        others = [f for f in others if os.path.isdir(f) and f != self.IMAGE_DIR]
        also = f"; {others[0]} exists too, --image_root chooses it" if others else ""
        return f"image {path} of {self!r} does not exist; {tried}{also}; {HELP}"

    def showRef(self, ref: Ref, seg_box: str = "seg") -> Image.Image:
        """Draw a reference on its image.

        Args:
            ref: from `loadRefs`.
            seg_box: 'seg' tints the objects, 'box' draws their bounding box.

        Returns:
            A new RGB image at the size on record, with the expressions below it.
        """
        from refer import drawing

        image = self._annotated_image(ref)
        if seg_box == "box":
            drawing.box(image, *self.getRefBox(ref["ref_id"]))
        else:
            image = drawing.tint(image, self.getMask(ref)["mask"])
        lines = [f"{i}. {s['sent']}" for i, s in enumerate(ref["sentences"], 1)]
        return drawing.caption(image, lines)

    def showMask(self, ref: Ref) -> Image.Image:
        """Draw a reference's mask over its image, without the expressions."""
        from refer import drawing

        return drawing.tint(self._annotated_image(ref), self.getMask(ref)["mask"])

    def _annotated_image(self, ref: Ref) -> Image.Image:
        """A reference's image at the size on record."""
        image, (_, size) = self.open_image(ref["image_id"]), self._file(ref["image_id"])
        return image if image.size == size else image.resize(size)

    def _get(self, table: dict[int, Any], key: int, what: str) -> Any:
        if key not in table:
            raise InputError(f"{self!r} has no {what} {key}")
        return table[key]

    def _load(self, table: dict[int, Any], ids: Ids | None, what: str) -> list[Any]:
        if ids is None:
            return list(table.values())
        return [self._get(table, key, what) for key in _ids(ids)]


def in_split(label: str, split: str) -> bool:
    """Whether a reference labelled `label` belongs to `split` (see `REFER.getRefIds`)."""
    if split == "test":
        return "test" in label
    if split.startswith("test"):
        return all(letter in label.partition("test")[2] for letter in split[len("test") :])
    return label == split


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which is slow while millions of records are made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _ids(ids: Ids) -> Sequence[int]:
    return [int(ids)] if isinstance(ids, int | np.integer) else list(ids)


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_POLYGON  # not nan


def _by_id(records: list[Record], key: str, what: str, path: Path) -> dict[int, Record]:
    table = {record[key]: record for record in records}
    if len(table) < len(records):
        for record in records:  # the same record twice does no harm
            if table[record[key]] != record:
                raise InputError(f"{path}: two different {what}s have the id {record[key]}")
    return table


def _dataset_folder(root: Path, dataset: str) -> Path:
    if dataset in ("", ".", "..") or set("/\\\0") & set(dataset):
        raise InputError(f"--dataset '{dataset}': give the name of a folder in {root}")
    if os.path.isdir(root / dataset):
        return root / dataset
    if not os.path.isdir(root):
        raise InputError(f"data folder {root} does not exist (--refer_data_root); {HELP}")
    folders = [path for path in root.iterdir() if path.is_dir()]
    there = sorted(f.name for f in folders if f.name in DATASETS or (f / "instances.json").exists())
    known = ", ".join(there) or f"no dataset at all; known are {', '.join(DATASETS)}"
    raise InputError(f"data folder {root} has no folder '{dataset}' (--dataset); it has {known}")


def image_folder(root: Path, dataset: str, image_root: str | Path | None) -> Path:
    """Folder of a dataset's images.

    Args:
        root: `data_root` of `REFER`.
        dataset: its name.
        image_root: the folder that the user gives, or None.

    Returns:
        The given folder, or the one in it that has the usual name (train2014), or the first of the
        dataset's that exists.

    Raises:
        InputError: the given folder does not exist.
    """
    usual = dataset_info(dataset).image_folders
    if image_root:
        given = Path(image_root)
        if not os.path.isdir(given):
            raise InputError(f"image folder {given} does not exist (--image_root); {HELP}")
        named = usual if dataset in DATASETS else COCO_FOLDERS
        inner = [given / folder.rpartition("/")[2] for folder in named]
        return next((folder for folder in inner if os.path.isdir(folder)), given)
    candidates = [root / folder for folder in usual]
    return next((folder for folder in candidates if os.path.isdir(folder)), candidates[0])
