"""Annotations of RefCOCO's size and form, made up: 50,000 objects in 19,994 images.

The counts are RefCOCO's (refer/datasets.py has them all). Polygons are closed curves of COCO's
usual number of points. Expressions are drawn from a list of real ones where there is one, else
from RefShapes' words. There are no image files.
"""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = {  # references, expressions, images
    "train": (42404, 120624, 16994),
    "val": (3811, 10834, 1500),
    "testA": (1975, 5657, 750),
    "testB": (1810, 5095, 750),
}
ANNOTATIONS = 196_771
CATEGORIES = 80
TEXTS = Path(__file__).parents[2] / "shared" / "text" / "refcoco_family_eval_sentences.json.gz"


def write(root: Path, protocol: int = 0, seed: int = 0, times: int = 1) -> Path:
    """Write `refcoco/refs(unc).p` and `refcoco/instances.json`.

    Args:
        root: of the data.
        protocol: of the pickle; Python 2 wrote 0, the slowest to read, unless asked for another.
        seed: of the generator.
        times: RefCOCO's size.

    Returns:
        The dataset's folder.
    """
    rng = np.random.default_rng(seed)
    images, annotations = _instances(rng, times)
    refs = _refs(rng, images, annotations, times)
    folder = root / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    categories = [{"supercategory": "thing", "id": i, "name": f"thing {i}"} for i in range(1, 81)]
    tables = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(
        json.dumps({"info": {}, "licenses": []} | tables), "utf-8"
    )
    return folder


def sentences(number: int, rng: np.random.Generator) -> list[str]:
    """Referring expressions, drawn with replacement."""
    if TEXTS.is_file():
        lists = json.loads(gzip.decompress(TEXTS.read_bytes()))
        pool = [line["sent"] for name in sorted(lists) for line in lists[name]]
    else:
        words = ["small", "big", "red", "blue", "leftmost", "purple", "star", "ring", "square"]
        pool = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 8, 50_000)]
    return [pool[i] for i in rng.integers(0, len(pool), number)]


def _instances(rng: np.random.Generator, times: int) -> tuple[list[Any], list[Any]]:
    images = []
    for i in range(times * sum(image_count for _, _, image_count in SPLITS.values())):
        name = f"COCO_train2014_{29 * i + 9:012d}.jpg"
        images.append(
            {
                "license": 1 + i % 8,
                "file_name": name,
                "coco_url": f"http://mscoco.org/images/{29 * i + 9}",
                "height": int(rng.integers(360, 641)),
                "width": 640,
                "date_captured": "2013-11-17 05:57:24",
                "flickr_url": f"http://farm8.staticflickr.com/7198/{i:010d}_5b2ff2eb57_z.jpg",
                "id": 29 * i + 9,
            }
        )
    owners = np.concatenate(  # every image has some; the rest falls where it may
        [np.arange(len(images)).repeat(3), rng.integers(0, len(images), times * ANNOTATIONS)]
    )[: times * ANNOTATIONS]
    annotations = [_annotation(rng, n, images[i]) for n, i in enumerate(owners.tolist())]
    return images, annotations


def _annotation(rng: np.random.Generator, number: int, image: dict[str, Any]) -> dict[str, Any]:
    width, height = image["width"], image["height"]
    polygons = []
    for _ in range(1 + int(rng.random() < 0.15) * int(rng.integers(1, 4))):
        corners = int(min(8 + rng.exponential(12), 150))
        angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        radius = rng.uniform(15, 110) * rng.uniform(0.8, 1.2, corners)
        x = (rng.uniform(60, width - 60) + radius * np.cos(angle)).clip(0, width)
        y = (rng.uniform(60, height - 60) + radius * np.sin(angle)).clip(0, height)
        polygons.append(np.stack([x, y], 1).round(2).ravel().tolist())
    xs, ys = np.array(polygons[0][::2]), np.array(polygons[0][1::2])
    box = [xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)]
    return {
        "segmentation": polygons,
        "area": round(float(rng.uniform(100, 30000)), 4),
        "iscrowd": 0,
        "image_id": image["id"],
        "bbox": [round(float(n), 2) for n in box],
        "category_id": 1 + number % CATEGORIES,
        "id": 200_000_000 - 3 * number,
    }


def _refs(
    rng: np.random.Generator, images: list[Any], annotations: list[Any], times: int
) -> list[Any]:
    by_image: dict[int, list[Any]] = {}
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    sizes = {split: [times * n for n in counts] for split, counts in SPLITS.items()}
    texts = iter(sentences(sum(n for _, n, _ in sizes.values()), rng))
    names = {image["id"]: image["file_name"] for image in images}
    refs: list[Any] = []
    first, sent_id = 0, 0
    for split, (objects, expressions, image_count) in sizes.items():
        ids = [image["id"] for image in images[first : first + image_count]]
        first += image_count
        chosen = sorted(
            ((rank, i, a) for i in ids for rank, a in enumerate(by_image[i])),
            key=lambda entry: entry[:2],
        )[:objects]  # an image's first, then its second ...
        counts = np.ones(objects, int)
        np.add.at(counts, rng.integers(0, objects, expressions - objects), 1)
        for (_, image_id, annotation), count in zip(chosen, counts.tolist(), strict=True):
            sent_ids = list(range(sent_id, sent_id + count))
            sent_id += count
            spoken = [next(texts) for _ in sent_ids]
            refs.append(
                {
                    "sent_ids": sent_ids,
                    "file_name": names[image_id].replace(".jpg", f"_{annotation['id']}.jpg"),
                    "ann_id": annotation["id"],
                    "ref_id": len(refs),
                    "image_id": image_id,
                    "split": split,
                    "sentences": [
                        {"tokens": s.split(), "raw": s.capitalize(), "sent_id": i, "sent": s}
                        for i, s in zip(sent_ids, spoken, strict=True)
                    ],
                    "category_id": annotation["category_id"],
                }
            )
    return refs
