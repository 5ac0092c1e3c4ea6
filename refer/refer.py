"""The REFER data API: which sentence refers to which object of which image.

Written afresh for the file layout in refer/README.md; the class, its methods and attributes
have the names that code for these data sets expects.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data.cache import ArrayCache, digest
from lib.errors import InputError
from refer import instances, pickles
from refer.arrays import FORM, Tables
from refer.images import open_rgb
from refer.instances import Record, load_instances
from refer.masks import MAX_OUTLINE, draw_components
from refer.pickles import Ref, load_refs

DATASETS = ("refcoco", "refcoco+", "refcocog", "refclef")
COCO_FOLDERS = ("images/mscoco/images/train2014", "images/train2014")
REFCLEF_FOLDER = "images/saiapr_tc-12"
HELP = "see refer/README.md"
SMALL = 4 << 20  # bytes of annotations that are read as fast as they are looked up
LARGEST = max(instances.MAX_BYTES, pickles.MAX_BYTES)
# What `REFER` reads when it is first asked for.
RECORDS = {"data", "Refs", "Anns", "Imgs", "Cats", "Sents", "imgToRefs", "imgToAnns", "catToRefs"}
RECORDS |= {"refToAnn", "annToRef", "sentToRef", "sentToTokens"}

Ids = int | Iterable[int]


class REFER:
    """References of one data set, indexed.

    Args:
        data_root: folder with the data sets' folders.
        dataset: refcoco, refcoco+, refcocog, refclef, or another folder of the same layout.
        splitBy: who made the splits: unc, umd, google, berkeley; names the pickle.
        image_root: folder of the images, or the one above `train2014`; by default
            the first of `COCO_FOLDERS` that exists under `data_root`.
        cache: where `tables` are kept between runs. A data set found there is known to be
            sound, and its records are read from the files when they are first asked for.

    Attributes:
        data: {'dataset', 'refs', 'images', 'annotations', 'categories'} as read.
        Refs, Anns, Imgs: record by id. Cats: name by id.
        Sents: sentence record by sent_id.
        imgToRefs, imgToAnns: lists by image_id. catToRefs: lists by category_id.
        refToAnn: annotation by ref_id. annToRef: reference by ann_id (the last one).
        sentToRef, sentToTokens: by sent_id.
        IMAGE_DIR: folder of the images.

    Raises:
        InputError: a file is missing or damaged, or a reference has no annotation or image.
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
    annToRef: dict[int, Ref]
    sentToRef: dict[int, Ref]
    sentToTokens: dict[int, list[str]]

    def __init__(
        self,
        data_root: str | Path,
        dataset: str = "refcoco",
        splitBy: str = "unc",
        image_root: str | Path | None = None,
        cache: ArrayCache | None = None,
    ) -> None:
        self.ROOT_DIR = Path(data_root)
        self.DATA_DIR = _dataset_folder(self.ROOT_DIR, dataset)
        self.dataset = dataset
        self.splitBy = splitBy
        self.IMAGE_DIR = image_folder(self.ROOT_DIR, dataset, image_root)
        self._real_image_dir = os.path.realpath(self.IMAGE_DIR)
        self._files = (_refs_pickle(self.DATA_DIR, splitBy), self.DATA_DIR / "instances.json")
        if not os.path.isfile(self._files[1]):
            raise InputError(f"{self._files[1]} does not exist; {HELP}")
        self.cache = cache
        self._tables: Tables | None = None
        with _no_garbage():
            if cache is not None and self._worth_keeping():
                self._tables = self._tables_from_files(cache)
            else:
                self._read()

    def _read(self, *, index_refs: bool = True) -> None:
        """Read, check and index the records."""
        pickle_path, instances_path = self._files
        self.data = {"dataset": self.dataset}
        with _no_garbage():
            self.data["refs"] = load_refs(pickle_path)
            self.data.update(load_instances(instances_path))
            self._index_instances(instances_path)
            use_refs = self._index_refs if index_refs else self._check_refs
            use_refs(self.data["refs"], pickle_path)

    def __getattr__(self, name: str) -> Any:
        if name not in RECORDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._read()
        return self.__dict__[name]

    @property
    def tables(self) -> Tables:
        """The records as arrays, for training and evaluation.

        Asking for them lets go of the records, which take a hundred times the memory; they are
        read again when they are asked for. Arrays do not follow changes of records.
        """
        if self._tables is None:
            with _no_garbage():
                self._tables = self._pack()
        return self._tables

    def _pack(self) -> Tables:
        tables = Tables.pack(self.data["refs"], self.Imgs, self.Anns, self.Cats)
        for name in RECORDS & self.__dict__.keys():
            delattr(self, name)
        return tables

    def _tables_from_files(self, cache: ArrayCache) -> Tables:
        """From the cache; else from the records, and into the cache."""
        before = self._stamp()
        key = digest(*(path.read_bytes() for path in self._files))
        kind = f"{self.dataset}-{self.splitBy}-{FORM}"
        kept = cache.get(kind, key)
        if kept is None:
            self._read(index_refs=False)
            tables = self._pack()
            if self._stamp() != before:  # another content was read than was looked up
                return tables
            kept = cache.put(kind, key, tables.arrays())
        return Tables.from_arrays(kept)

    def _worth_keeping(self) -> bool:
        """Whether the files can be read, for the readers say best why not, and are large."""
        sizes = [os.path.getsize(p) for p in self._files if os.access(p, os.R_OK) and p.is_file()]
        return len(sizes) == len(self._files) and sum(sizes) >= SMALL and max(sizes) <= LARGEST

    def _stamp(self) -> list[tuple[int, int]]:
        return [(stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, self._files)]

    def __repr__(self) -> str:
        return f"{self.dataset}({self.splitBy})"

    def _index_instances(self, path: Path) -> None:
        self.Imgs = _by_id(self.data["images"], "id", "image", path)
        self.Anns = _by_id(self.data["annotations"], "id", "annotation", path)
        self.Cats = {c["id"]: c["name"] for c in self.data["categories"]}
        self.imgToAnns = {}
        for ann in self.data["annotations"]:
            self.imgToAnns.setdefault(ann["image_id"], []).append(ann)

    def _check_refs(self, refs: list[Ref], path: Path) -> None:
        self.Refs = _by_id(refs, "ref_id", "reference", path)
        for ref in refs:
            if ref["ann_id"] not in self.Anns:
                raise InputError(
                    f"{path}: reference {ref['ref_id']} is of annotation {ref['ann_id']}, which "
                    f"{self.DATA_DIR / 'instances.json'} does not have; {HELP}"
                )
            if ref["image_id"] not in self.Imgs:
                raise InputError(
                    f"{path}: reference {ref['ref_id']} is in image {ref['image_id']}, which "
                    f"{self.DATA_DIR / 'instances.json'} does not have; {HELP}"
                )

    def _index_refs(self, refs: list[Ref], path: Path) -> None:
        self._check_refs(refs, path)
        self.imgToRefs, self.catToRefs, self.refToAnn, self.annToRef = {}, {}, {}, {}
        self.Sents, self.sentToRef, self.sentToTokens = {}, {}, {}
        for ref in refs:
            self.imgToRefs.setdefault(ref["image_id"], []).append(ref)
            self.catToRefs.setdefault(ref["category_id"], []).append(ref)
            self.refToAnn[ref["ref_id"]] = self.Anns[ref["ann_id"]]
            self.annToRef[ref["ann_id"]] = ref
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
        """What to raise where no reference is in a split."""
        return InputError(
            f"{self!r} has no split '{split}'; choose from {', '.join(self.splits())}"
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
            InputError: the data set has no reference in this split.
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
            referred = {self._get(self.Refs, ref, "ref_id")["ann_id"] for ref in refs}
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
        """Bounding box [x, y, width, height] in pixels: the annotation's, else the mask's."""
        ref = self._get(self.Refs, ref_id, "ref_id")
        box = self.refToAnn[ref_id].get("bbox")
        if isinstance(box, list) and len(box) == 4 and all(map(_is_coordinate, box)):
            return box.copy()
        ys, xs = np.nonzero(self.getMask(ref)["mask"])
        if not len(xs):
            return [0.0, 0.0, 0.0, 0.0]
        x, y = float(xs.min()), float(ys.min())
        return [x, y, float(xs.max()) - x + 1, float(ys.max()) - y + 1]

    def getMask(self, ref: Ref) -> dict[str, Any]:
        """Draw a reference's object.

        Args:
            ref: from `loadRefs`.

        Returns:
            {'mask': (H, W) uint8, the number of the object's components that cover each
            pixel (above 1 where components overlap), 'area': their areas' sum, pixels}.

        Raises:
            InputError: the annotation has no polygons, or damaged ones.
        """
        image = self.Imgs[ref["image_id"]]
        where = f"{self!r}: annotation {ref['ann_id']} of reference {ref['ref_id']}"
        segmentation = self.refToAnn[ref["ref_id"]].get("segmentation")
        mask = draw_components(segmentation, image["height"], image["width"], where)
        return {"mask": mask, "area": int(mask.sum())}

    def image_path(self, image_id: int) -> Path:
        """Where an image's file is expected.

        Raises:
            InputError: the file's name, or a symbolic link in the folder, leads out of the
                image folder. The folder itself may be a link.
        """
        name = self._file_name(image_id)
        if leads_out(name):
            raise InputError(
                f"{self.DATA_DIR / 'instances.json'}: the file name {name[:80]!r} of image "
                f"{image_id} leads out of the image folder"
            )
        path = self.IMAGE_DIR / name
        may_be_elsewhere = "/" in name or os.path.islink(path)
        if may_be_elsewhere and not self._is_inside(os.path.realpath(path)):
            raise InputError(
                f"image {path} is a link out of the image folder: put the picture itself there, "
                "or name the folder that it is in with --image_root"
            )
        return path

    def _is_inside(self, real_path: str) -> bool:
        return os.path.commonpath([real_path, self._real_image_dir]) == self._real_image_dir

    def _file_name(self, image_id: int) -> str:
        row = None if self._tables is None else self._tables.image_row(image_id)
        if self._tables is None or row is None:
            return self._get(self.Imgs, image_id, "image_id")["file_name"]
        return self._tables.file_name[row]

    def open_image(self, image_id: int) -> Image.Image:
        """Open an image as RGB.

        Raises:
            InputError: missing, damaged or too large; says where it was looked for.
        """
        path = self.image_path(image_id)
        if not os.path.isfile(path):
            raise InputError(self.missing_image(path))
        return open_rgb(path)

    def missing_image(self, path: Path) -> str:
        """One line on a missing image: its folder's absence explains all of them."""
        if not os.path.isdir(self.IMAGE_DIR):
            return (
                f"image folder {self.IMAGE_DIR} of {self!r} does not exist; put the images there "
                f"or name their folder with --image_root, {HELP}"
            )
        return f"image {path} of {self!r} does not exist; {HELP}"

    def showRef(self, ref: Ref, seg_box: str = "seg") -> Image.Image:
        """Draw a reference on its image.

        Args:
            ref: from `loadRefs`.
            seg_box: 'seg' tints the object, 'box' draws its bounding box.

        Returns:
            A new RGB picture at the image's own size, the sentences written below it.
        """
        picture = self.open_image(ref["image_id"])
        if seg_box == "box":
            x, y, width, height = self.getRefBox(ref["ref_id"])
            draw = ImageDraw.Draw(picture)
            draw.rectangle((x, y, x + width, y + height), outline=(0, 255, 0), width=3)
        else:
            picture = _tint(picture, self.getMask(ref)["mask"])
        lines = [f"{i}. {s['sent']}" for i, s in enumerate(ref["sentences"], start=1)]
        return _caption(picture, lines)

    def showMask(self, ref: Ref) -> Image.Image:
        """Draw a reference's mask over its image, without the sentences."""
        return _tint(self.open_image(ref["image_id"]), self.getMask(ref)["mask"])

    def _get(self, table: dict[int, Any], key: int, what: str) -> Any:
        if key not in table:
            raise InputError(f"{self!r} has no {what} {key}")
        return table[key]

    def _load(self, table: dict[int, Any], ids: Ids | None, what: str) -> list[Any]:
        if ids is None:
            return list(table.values())
        return [self._get(table, key, what) for key in _ids(ids)]


def leads_out(file_name: str) -> bool:
    """Whether a file name, taken relative to a folder, may be of a file outside of it."""
    parts = PurePosixPath(file_name.replace("\\", "/")).parts
    unsafe = not parts or parts[0][0] == "/" or ".." in parts or ":" in parts[0]
    return unsafe or "\0" in file_name or not _is_text(file_name)


def _is_text(name: str) -> bool:
    """Whether a file can be called so; half a surrogate pair, as in broken JSON, is no letter."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def in_split(label: str, split: str) -> bool:
    """Whether a reference labelled `label` belongs to `split` (see `REFER.getRefIds`)."""
    if split == "test":
        return "test" in label
    if split.startswith("test"):
        return all(letter in label.partition("test")[2] for letter in split[len("test") :])
    return label == split


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Pause the collector: millions of new records make it run often, and none is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _ids(ids: Ids) -> Sequence[int]:
    return [ids] if isinstance(ids, int) else list(ids)


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_OUTLINE  # not nan


def _by_id(records: list[Record], key: str, what: str, path: Path) -> dict[int, Record]:
    table = {record[key]: record for record in records}
    if len(table) < len(records):
        for record in records:  # the same record twice does no harm
            if table[record[key]] != record:
                raise InputError(f"{path}: two different {what}s have the id {record[key]}")
    return table


def _dataset_folder(root: Path, dataset: str) -> Path:
    plain = dataset not in ("", ".", "..") and not set("/\\\0") & set(dataset)
    if plain and os.path.isdir(root / dataset):
        return root / dataset
    if not plain or dataset not in DATASETS:
        raise InputError(f"unknown data set '{dataset}'; choose from {', '.join(DATASETS)}")
    if not os.path.isdir(root):
        raise InputError(f"data folder {root} does not exist (--refer_data_root); {HELP}")
    raise InputError(f"data folder {root} has no folder '{dataset}'; {HELP}")


def _refs_pickle(folder: Path, split_by: str) -> Path:
    path = folder / f"refs({split_by}).p"
    there = sorted(file.name[5:-3] for file in folder.glob("refs(*).p"))
    if split_by not in there:
        choice = f"there is {', '.join(there)} (--splitBy)" if there else "there is none at all"
        raise InputError(f"{path} does not exist; {choice}, {HELP}")
    return path


def image_folder(root: Path, dataset: str, image_root: str | Path | None) -> Path:
    """Folder of a data set's images.

    Args:
        root: `data_root` of `REFER`.
        dataset: its name.
        image_root: a folder that is given, or None.

    Returns:
        The given folder, or its train2014, or the first usual one under the root.

    Raises:
        InputError: the given folder does not exist.
    """
    if image_root:
        given = Path(image_root)
        if not os.path.isdir(given):
            raise InputError(f"image folder {given} does not exist (--image_root); {HELP}")
        inner = given / "train2014"
        return inner if dataset != "refclef" and os.path.isdir(inner) else given
    if dataset == "refclef":
        return root / REFCLEF_FOLDER
    candidates = [root / folder for folder in COCO_FOLDERS]
    return next((folder for folder in candidates if os.path.isdir(folder)), candidates[0])


def _tint(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    alpha = Image.fromarray((mask > 0).astype(np.uint8) * 128)
    if alpha.size != picture.size:  # the polygons' coordinates are of the annotated size
        alpha = alpha.resize(picture.size, Image.Resampling.NEAREST)
    green = Image.new("RGB", picture.size, (0, 255, 0))
    return Image.composite(green, picture, alpha)


def _caption(picture: Image.Image, lines: list[str]) -> Image.Image:
    line_height = 14
    sheet = Image.new(
        "RGB", (picture.width, picture.height + line_height * len(lines) + 4), "white"
    )
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        printable = line.encode("latin-1", "replace").decode("latin-1")  # PIL's own font
        draw.text((4, picture.height + 2 + i * line_height), printable, fill="black")
    return sheet
