"""Make the records of a REFER dataset from what :mod:`refer.convert.sources` read."""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

import utils
from lib.errors import InputError
from refer.check import OUTSIDE, overshoot, polygons_of
from refer.convert.sources import Item, MaskFile, inner, read_text
from refer.images import check_pixels, open_rgb
from refer.instances import Record
from refer.masks import draw_components, run_lengths
from refer.names import Finder, parts_of
from refer.rare_images import orientation_of

MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # without loss
SPLITS = re.compile(r"train|val|test[A-Z]*")
OTHER_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val"}
QUALITY = 95  # of upright copies


@dataclass(frozen=True)
class Converted:
    """A dataset to be written.

    Attributes:
        refs: the content of `refs(X).p`.
        instances: the content of `instances.json`.
        files: the image files by their names in the dataset.
        remarks: lines to print.
    """

    refs: list[Record]
    instances: dict[str, Any]
    files: dict[str, Path]
    remarks: list[str]


def build(items: Sequence[Item], args: Namespace, scratch: Path) -> Converted:
    """Draw all masks and make the records.

    Args:
        items: the references.
        args: of the command line: images, masks (a list of folders), exif, ratios, seed,
            max_pixels.
        scratch: folder for images that are written anew; nothing else is written.

    Raises:
        InputError: an image, a mask, an expression or a split is wrong.
    """
    finder = Finder(args.images, {inner(item.image) for item in items})
    embedded = scratch / "embedded"
    by_image: dict[Path, list[Item]] = {}
    for item in items:
        item.expressions = [_expression(text, item.where) for text in item.expressions]
        if not item.expressions:
            raise InputError(f"{item.where}: has no expression")
        by_image.setdefault(_find_image(item, finder, embedded), []).append(item)
    assign_splits(by_image, args.ratios, args.seed)
    names = sorted({item.category or "object" for item in items})
    categories = {name: number for number, name in enumerate(names, 1)}
    made = Converted([], {"images": [], "annotations": []}, {}, [])
    made.instances["categories"] = [{"id": i, "name": name} for name, i in categories.items()]
    sent_ids, turned = itertools.count(1), 0
    empty: list[str] = []
    for image_id, (source, own) in enumerate(utils.progress(by_image.items(), "images", 0), 1):
        image = open_rgb(source, args.max_pixels)
        root = embedded if source.is_relative_to(embedded) else args.images
        name = source.relative_to(root).as_posix()
        made.files[name] = source
        if args.exif == "upright" and orientation_of(image) > 1:
            turned += 1
            made.files[name] = scratch / "upright" / name
            image = _save_upright(image, source, made.files[name])
        size = {"width": image.width, "height": image.height}
        made.instances["images"].append({"id": image_id, "file_name": name} | size)
        for item in own:
            if item.size and item.size != image.size:
                what = f"{item.where}: annotations"
                raise InputError(_wrong_size(what, item.size, image, source))
            masks = [_draw(drawn, item.where, image, source, args) for drawn in item.objects]
            if masks and not any(mask.any() for mask in masks):
                what = "nothing is drawn in it; null means that nothing in the image is meant"
                raise InputError(f"{item.where}: {_names_of(item.objects)}: {what}")
            if not all(mask.any() for mask in masks):
                empty.append(item.where)
            ids = {"image_id": image_id, "category_id": categories[item.category or "object"]}
            ann_ids = []
            for mask in filter(np.any, masks):
                ann_ids.append(len(made.instances["annotations"]) + 1)
                made.instances["annotations"].append({"id": ann_ids[-1]} | ids | _outline(mask))
            ids["ref_id"] = len(made.refs) + 1
            made.refs.append(ids | {"file_name": name} | _reference(item, ann_ids, sent_ids))
    if turned:
        what = "with EXIF orientation: an upright copy of each is written, without metadata"
        made.remarks.append(f"{turned} of {len(by_image)} images {what}")
    if empty:
        what = "have an object without a pixel, which is left out; the first"
        made.remarks.append(f"{len(empty)} of {len(items)} references {what}: {empty[0]}")
    return made


def _names_of(objects: Sequence[Any]) -> str:
    """Objects of a reference in words."""
    drawn = objects[0]
    if not isinstance(drawn, MaskFile):
        return "segmentation"
    value = "" if drawn.value is None else f", pixels of value {drawn.value}"
    return f"mask {drawn.name!r:.200}{value}"


def _reference(item: Item, ann_ids: list[int], sent_ids: Iterator[int]) -> Record:
    """The part of a reference's record that says nothing of its image."""
    sentences = [
        {"sent_id": next(sent_ids), "raw": text, "sent": sent, "tokens": sent.split()}
        for text in item.expressions
        for sent in [text.lower()]
    ]
    return {
        "ann_id": ann_ids[0] if len(ann_ids) == 1 else ann_ids,
        "split": item.split,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def _expression(text: Any, where: str) -> str:
    words = text.split() if isinstance(text, str) else []
    if not words:
        raise InputError(f"{where}: an expression is empty, or is not a text")
    return " ".join(words)


def _find_image(item: Item, finder: Finder, folder: Path) -> Path:
    """The file of an item's image; one that only a LabelMe file holds is written to `folder`."""
    if path := finder.find(inner(item.image)):
        return path
    path = folder.joinpath(*parts_of(inner(item.image)))
    if item.embedded and not path.exists():
        try:
            data = json.loads(read_text(item.embedded))["imageData"]
            data = base64.b64decode(data, validate=True)
        except (ValueError, TypeError) as e:
            raise InputError(f"{item.embedded}: 'imageData' is damaged ({e})") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if not item.embedded:
        raise InputError(
            f"{item.where}: image {item.image!r:.200} does not exist in {finder.folder} (--images)"
        )
    return path


def _save_upright(image: Image.Image, source: Path, path: Path) -> Image.Image:
    """Turn an image as its EXIF orientation says; write it in the format of its name, or as PNG."""
    try:
        pixels = np.asarray(ImageOps.exif_transpose(image))
    except Exception:  # PIL raises many kinds for damaged metadata
        raise InputError(f"image {source} has damaged EXIF data: save it again") from None
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    upright = Image.fromarray(pixels)  # without metadata
    upright.save(path, format=kind if kind in Image.SAVE else "PNG", quality=QUALITY)
    return upright


def _wrong_size(what: str, size: tuple[int, int], image: Image.Image, path: Path) -> str:
    text = "{} of {}x{} pixels, but the image {} has {}x{}".format(what, *size, path, *image.size)
    if size == image.size[::-1]:
        text += "; if they were drawn on a photo as it is stored, or as people see it, give "
        text += "--exif stored or --exif upright"
    return text


def _draw(
    drawn: Any, where: str, image: Image.Image, source: Path, args: Namespace
) -> npt.NDArray[np.bool_]:
    """The mask (H, W) of an object.

    Raises:
        InputError: it does not exist, is damaged, or does not fit the image.
    """
    if isinstance(drawn, MaskFile):
        file = _find_mask(drawn.name, where, source, args)
        mask = read_mask(file, drawn.value, args.max_pixels, where)
        if mask.shape != image.size[::-1]:
            size = mask.shape[1], mask.shape[0]
            raise InputError(_wrong_size(f"{where}: mask {file}", size, image, source))
        return mask
    beyond = overshoot(polygons_of(drawn), *image.size)
    if not beyond <= OUTSIDE:
        what = f"{source} of {image.width}x{image.height} pixels by {beyond:.0f}"
        raise InputError(f"{where}: a polygon leaves the image {what}")
    return draw_components(drawn, image.height, image.width, where) > 0


def _find_mask(name: str, where: str, image: Path, args: Namespace) -> Path:
    inside = inner(name)
    for folder in args.masks:
        path = folder / name
        if not path.is_file():
            found = Finder(folder, [inside]).find(inside)
            if not found:
                continue
            path = found
            if not args.any_folder and len(path.relative_to(folder).parts) < len(parts_of(inside)):
                continue  # a mask that is missing must not be taken from elsewhere
        if path.samefile(image):
            raise InputError(f"{where}: mask {name!r:.200} is the image itself (--masks)")
        return path
    folders = " or ".join(map(str, dict.fromkeys(args.masks)))
    raise InputError(f"{where}: mask {name!r:.200} does not exist in {folders} (--masks)")


def read_mask(
    path: Path, value: int | str | None, max_pixels: int, where: str
) -> npt.NDArray[np.bool_]:
    """The pixels (H, W) of an object in a mask file.

    Args:
        path: PNG, TIFF, BMP or GIF.
        value: of the object's pixels (an index of the palette), or '#rrggbb'; None: all that are
            neither black nor transparent; if there are none, all that are not transparent.
        max_pixels: upper limit of its size.
        where: it is named, for error messages.

    Raises:
        InputError: it cannot be read, or its pixels are colors and `value` is a number.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=MASK_FORMATS) as image:
            warnings.simplefilter("ignore")  # on transparency and metadata
            check_pixels(f"{where}: mask {path}", image.width, image.height, max_pixels)
            if isinstance(value, str):
                color = [int(value[i : i + 2], 16) for i in (1, 3, 5)]
                return np.asarray((np.asarray(image.convert("RGB")) == color).all(axis=-1))
            if value is not None and image.mode in ("P", "L", "1", "I", "I;16", "I;16B"):
                return np.asarray(np.asarray(image, np.int64) == value)
            if value is not None:
                raise InputError(f"{where}: mask {path} is {image.mode}: give 'value' as '#rrggbb'")
            if image.mode in ("P", "PA", "LA"):
                image = image.convert("RGBA")
            pixels = np.asarray(image)
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        kinds = ", ".join(MASK_FORMATS)
        raise InputError(f"{where}: mask {path} is not {kinds} (lossless), or damaged") from None
    except Exception as e:  # PIL's decoders raise nearly anything for damaged files
        raise InputError(f"{where}: mask {path} cannot be read: {str(e)[:120]}") from None
    if pixels.ndim == 2:
        return np.asarray(pixels != 0)
    opaque = np.asarray((pixels[..., 3:] > 0).all(axis=-1))
    both = np.asarray(pixels[..., :3].any(axis=-1) & opaque)
    return both if both.any() or opaque.all() else opaque  # drawn in black on nothing


def _outline(mask: npt.NDArray[np.bool_]) -> Record:
    """The part of an annotation's record that says where the object is."""
    rle = run_lengths(mask)
    box = [float(value) for value in coco_mask.toBbox(rle)]
    return {"segmentation": rle, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}


def assign_splits(by_image: dict[Path, list[Item]], ratios: Sequence[float], seed: int) -> None:
    """Check the splits of all items; where none is given, divide the images at random.

    Raises:
        InputError: a split is unknown, only some are given, or there are too few images.
    """
    items = [item for own in by_image.values() for item in own]
    for item in items:
        item.split = OTHER_NAMES.get(item.split, item.split)
        if item.split and not SPLITS.fullmatch(item.split):
            known = "train, val, test, testA and testB"
            raise InputError(
                f"{item.where}: split {item.split!r:.40} is unknown; there are {known}"
            )
    without = [item for item in items if not item.split]
    if without and len(without) < len(items):
        raise InputError(f"{without[0].where}: has no split, but others have: give all or none")
    if not without:
        return
    paths = sorted(by_image)
    random.Random(seed).shuffle(paths)
    counts = [max(1, round(ratio * len(paths))) if ratio else 0 for ratio in ratios]
    largest = counts.index(max(counts))
    counts[largest] += len(paths) - sum(counts)
    if counts[largest] < 1:
        parts = sum(map(bool, ratios))
        what = f"{len(paths)} images are too few for {parts} splits"
        raise InputError(f"{what}: --split_ratio 1,0,0 takes all for training")
    labels = [s for s, n in zip(("train", "val", "test"), counts, strict=True) for _ in range(n)]
    for path, label in zip(paths, labels, strict=True):
        for item in by_image[path]:
            item.split = label
