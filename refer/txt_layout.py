"""Read RefSegRS and RISBench: images, masks of the same names, and a text file a split.

    FOLDER/output_phrase_train.txt    a line each: NAME words of the expression
    FOLDER/images/NAME.tif
    FOLDER/masks/NAME.tif             a pixel above 50 belongs to the target

Masks are read when they are drawn.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

import utils
from lib.errors import InputError
from refer.images import FORMATS, MAX_PIXELS, check_pixels, open_rgb
from refer.instances import Record
from refer.masks import UInt8Array

SPLITS = ("train", "val", "test")
FOREGROUND = 50  # a mask's pixel belongs to the target if it is above
MAX_BYTES = 64 << 20  # of a text file


def find(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The folder and that of its masks.

    Raises:
        InputError: no split is there.
    """
    if not any(_phrases(folder, split).is_file() for split in SPLITS):
        names = ", ".join(_phrases(folder, split).name for split in SPLITS)
        raise InputError(f"{folder} has none of {names}; see docs/datasets.md")
    return folder, folder / "masks"


def read(files: tuple[Path, Path], max_pixels: int = MAX_PIXELS) -> dict[str, list[Record]]:
    """The records: refs, images, annotations, categories; a line is a reference.

    A name is one image with one annotation, whose segmentation is the path of its mask.

    Raises:
        InputError: a text file cannot be read, or a name has no mask.
    """
    folder, masks = files
    of_name = _files_by_name(masks)
    images = _files_by_name(folder / "images") if (folder / "images").is_dir() else of_name
    number: dict[str, int] = {}
    refs: list[Record] = []
    for split in SPLITS:
        for where, line in _lines(_phrases(folder, split)):
            name, _, words = line.partition(" ")
            name = name if name in of_name else os.path.splitext(name)[0]
            if name not in of_name:
                raise InputError(f"{where}: {masks} has no mask of the name {name[:80]!r}")
            of_image = number.setdefault(name, len(number) + 1)
            refs.append(_reference(len(refs) + 1, of_image, split, words.strip()))
    records = []
    annotations = []
    for name, i in utils.progress(number.items(), "masks", 0):
        width, height = _size(masks / of_name[name], max_pixels)
        file_name = images.get(name, of_name[name])
        records.append({"id": i, "file_name": file_name, "width": width, "height": height})
        path = str(masks / of_name[name])
        annotations.append({"id": i, "image_id": i, "category_id": -1, "segmentation": path})
    return {"refs": refs, "images": records, "annotations": annotations, "categories": []}


def draw(segmentation: str, height: int, width: int, where: str) -> UInt8Array:
    """(height, width) uint8, 1 where the mask's file is foreground.

    Args:
        segmentation: path of the file.
        height, width: of the image, pixels.
        where: name of the annotation, for error messages.

    Raises:
        InputError: the file cannot be read, or has another size.
    """
    image = open_rgb(segmentation)
    if image.size != (width, height):
        has = "{}x{}".format(*image.size)
        raise InputError(f"{where}: mask {segmentation} has {has} pixels, not {width}x{height}")
    return (np.asarray(image.convert("L")) > FOREGROUND).astype(np.uint8)


def _reference(number: int, image: int, split: str, words: str) -> Record:
    sentence = {"sent_id": number, "raw": words, "sent": words.lower(), "tokens": words.split()}
    return {
        "ref_id": number,
        "ann_id": image,
        "ann_ids": [image],
        "image_id": image,
        "category_id": -1,
        "split": split,
        "file_name": "",
        "sent_ids": [number],
        "sentences": [sentence],
    }


def _phrases(folder: Path, split: str) -> Path:
    return folder / f"output_phrase_{split}.txt"


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file with their place in words; none if it is missing."""
    if not path.is_file():
        return []
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES >> 20} MB")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({str(e)[:100]})") from None
    stripped = ((f"{path}, line {i}", line.strip()) for i, line in enumerate(lines, 1))
    return [(where, " ".join(line.split())) for where, line in stripped if line]


def _files_by_name(folder: Path) -> dict[str, str]:
    """File names by the part before their ending.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        return {os.path.splitext(name)[0]: name for name in sorted(os.listdir(folder))}
    except OSError as e:
        raise InputError(f"{folder}: cannot be read ({e.strerror}); see docs/datasets.md") from None


def _size(path: Path, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image, from its head."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Exception as e:  # PIL's decoders raise nearly anything for damaged files
        raise InputError(f"mask {path} cannot be read: {str(e)[:100]}") from None
    check_pixels(f"mask {path}", width, height, max_pixels)
    return width, height
