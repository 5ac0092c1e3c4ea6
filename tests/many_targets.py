"""Small datasets in the published forms, of the images and masks in tests/fixtures/refer_cc0."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refer import REFER
from refer.masks import run_lengths
from tests.refer_files import CC0_ROOT

CC0_IMAGES = CC0_ROOT / "images/mscoco/images/train2014"
Json = dict[str, Any]

# Split, image, annotations and expressions; [-1] is no target.
GREFS: list[tuple[str, int, list[int], list[str]]] = [
    ("train", 900001, [1], ["woman in the orange suit", "the astronaut"]),
    ("train", 900001, [2], ["black helmet"]),
    ("train", 900001, [3, 4], ["the shuttle and the flag"]),
    ("train", 900001, [-1], ["the cat on the left", "a dog"]),
    ("train", 900003, [8], ["the cup"]),
    ("train", 900003, [9], ["silver spoon"]),
    ("train", 900003, [8, 9, 10], ["everything on the table"]),
    ("train", 900003, [-1], ["the fork"]),
    ("val", 900002, [5], ["left eye"]),
    ("val", 900002, [5, 6], ["both eyes", "the eyes"]),
    ("val", 900002, [7], ["pink nose"]),
    ("val", 900002, [-1], ["the dog"]),
    ("val", 900002, [-1], ["a third eye", "two noses"]),
    ("testA", 900004, [11, 12], ["the rocket and the tower"]),
    ("testA", 900004, [-1], ["the plane"]),
    ("testB", 900004, [11], ["the rocket"]),
    ("testB", 900004, [12], ["leftmost tower"]),
]


def instances() -> Json:
    """The fixture's instances.json."""
    return json.loads((CC0_ROOT / "refcoco/instances.json").read_text(encoding="utf-8"))


def copy_images(folder: Path, renamed: dict[str, str] | None = None) -> None:
    """Copy the fixture's four images, under other names where given."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in CC0_IMAGES.iterdir():
        shutil.copy(path, folder / (renamed or {}).get(path.name, path.name))


def sentences(first: int, texts: list[str]) -> list[Json]:
    """Sentences as in the pickles, with ids from ``first``."""
    return [
        {"sent_id": first + i, "raw": t, "sent": t.lower(), "tokens": t.lower().split()}
        for i, t in enumerate(texts)
    ]


def grefs() -> list[Json]:
    """gRefCOCO's records; file names have an object number, as in the public file."""
    return [
        {
            "ref_id": 100 + i,
            "image_id": image,
            "split": split,
            "ann_id": list(anns),
            "category_id": [-1 if a == -1 else 1 for a in anns],
            "file_name": f"COCO_train2014_{image:012d}_{i}.jpg",
            "no_target": anns == [-1],
            "sent_ids": [10 * i + k for k in range(len(texts))],
            "sentences": sentences(10 * i, texts),
        }
        for i, (split, image, anns, texts) in enumerate(GREFS)
    ]


def write_grefcoco(root: Path, ending: str = ".json", images: str = "images/train2014") -> Path:
    """gRefCOCO below ``root``, with its references as JSON or as a pickle."""
    folder = root / "grefcoco"
    folder.mkdir(parents=True)
    packed = pickle.dumps(grefs()) if ending == ".p" else json.dumps(grefs()).encode()
    (folder / f"grefs(unc){ending}").write_bytes(packed)
    (folder / "instances.json").write_text(json.dumps(instances()))
    copy_images(root / images)
    return root


def write_ref_zom(root: Path, name: str = "Ref-ZOM(final).p") -> Path:
    """Ref-ZOM below ``root``: images of train2014 and val2014 in one folder."""
    renamed = {path.name: path.name for path in CC0_IMAGES.iterdir()}
    of_val = "COCO_train2014_000000900004.jpg"
    renamed[of_val] = of_val.replace("train2014", "val2014")
    content = instances()
    for image in content["images"]:
        image["file_name"] = renamed[image["file_name"]]
    refs = []
    for ref in grefs():
        anns = ref.pop("ann_id")
        ref.pop("no_target")
        ref["source"] = "zero" if anns == [-1] else "one" if len(anns) == 1 else "many"
        ref["ann_id"] = [] if anns == [-1] else anns[0] if len(anns) == 1 else anns
        ref["category_id"] = [] if anns == [-1] else 1
        ref["split"] = "train" if ref["split"] == "train" else "test"
        refs.append(ref)
    folder = root / "ref-zom"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(pickle.dumps(refs))
    (folder / "instances.json").write_text(json.dumps(content))
    copy_images(root / "images/trainval2014", renamed)
    return root


def masks() -> dict[int, np.ndarray]:
    """The fixture's masks by annotation, as RefCOCO draws them with union."""
    refer = REFER(CC0_ROOT, "refcoco", "unc")
    return {r["ann_ids"][0]: refer.getMask(r)["mask"] > 0 for r in refer.loadRefs()}


def write_rrsisd(root: Path) -> Path:
    """RRSIS-D below ``root``: a segmentation is a list of run lengths, here a mask's two halves."""
    content = instances()
    renamed = {}
    for image in content["images"]:
        renamed[image["file_name"]] = image["file_name"] = f"{image['id'] % 100:05d}.jpg"
    drawn = masks()
    for annotation in content["annotations"]:
        mask = drawn[annotation["id"]]
        upper = mask.copy()
        upper[len(mask) // 2 + 5 :] = False
        lower = mask.copy()
        lower[: len(mask) // 2 - 5] = False  # ten rows are in both
        annotation["segmentation"] = [run_lengths(upper), run_lengths(lower)]
    refs = [
        {
            "ref_id": i,
            "ann_id": ann,
            "category_id": 1,
            "image_id": image,
            "file_name": f"{image % 100:05d}.jpg",
            "split": {900002: "val", 900004: "test"}.get(image, "train"),
            "sent_ids": [i],
            "sentences": sentences(i, [text]),
        }
        for i, (ann, image, text) in enumerate(single_targets())
    ]
    folder = root / "rrsisd"
    folder.mkdir(parents=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(content))
    copy_images(root / "images/rrsisd/JPEGImages", renamed)
    return root


def single_targets() -> list[tuple[int, int, str]]:
    """Annotation, image and expression of the references with one target each, once."""
    refer = REFER(CC0_ROOT, "refcoco", "unc")
    return [(r["ann_ids"][0], r["image_id"], r["sentences"][0]["raw"]) for r in refer.loadRefs()]


def write_txt(root: Path, dataset: str = "refsegrs") -> Path:
    """RefSegRS or RISBench below ``root``: images, masks and a text file a split."""
    folder = root / dataset
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    drawn, lines = masks(), {"train": [], "val": [], "test": []}  # type: ignore[var-annotated]
    for ann, image, text in single_targets():
        pixels = Image.open(CC0_IMAGES / f"COCO_train2014_{image:012d}.jpg")
        pixels.save(folder / f"images/{ann}.tif")
        # 51 is foreground, 50 is not.
        Image.fromarray(np.where(drawn[ann], 51, 50).astype(np.uint8)).save(
            folder / f"masks/{ann}.tif"
        )
        split = {900002: "val", 900004: "test"}.get(image, "train")
        lines[split].append(f"{ann} {text}")
    for split, part in lines.items():
        (folder / f"output_phrase_{split}.txt").write_text("\n".join(part) + "\n\n")
    return root


def write_refcoco_m(root: Path) -> Path:
    """RefCOCO-M below ``root``, as one parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    drawn = masks()
    rows: dict[int, Json] = {}
    for ann, image, text in single_targets():
        name = f"COCO_train2014_{image:012d}.jpg"
        content = {"bytes": (CC0_IMAGES / name).read_bytes(), "path": name}
        row = rows.setdefault(
            image, {"image": content, "image_id": image, "file_name": name, "samples": []}
        )
        sample = {"id": ann, "image_id": image, "category": "object", "bbox": [0.0, 0.0, 1.0, 1.0]}
        sample |= {"sentences": [text, text.upper()], "mask": run_lengths(drawn[ann])}
        row["samples"].append(sample)
    (root / "refcoco-m/data").mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows.values()))
    parquet.write_table(table, root / "refcoco-m/data/validation-00000.parquet")
    return root
