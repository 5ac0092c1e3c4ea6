"""Writes files of predictions for tests, from references and made-up predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from refer.refer import REFER
from tests.refer_files import CC0_ROOT

Line = dict[str, Any]
Mask = npt.NDArray[np.bool_]


def rle(mask: Mask) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths, ready for JSON."""
    coded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(map(int, coded["size"])), "counts": coded["counts"].decode()}


def guess(truth: Mask, rng: np.random.Generator) -> Mask:
    """A prediction between perfect and wrong: the truth moved by a random share of its size."""
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    reach = (np.ptp(rows) + 1, np.ptp(columns) + 1) if truth.any() else (1, 1)
    by = [
        round(float(r) * rng.choice([0.0, 0.02, 0.1, 0.3, 0.9]) * rng.choice([-1, 1]))
        for r in reach
    ]
    moved = np.roll(truth, by, axis=(0, 1))
    return moved if rng.random() > 0.05 else np.zeros_like(truth)


def line(ref: Line, refer: REFER, split: str, sentence: Line, truth: Mask, result: Mask) -> Line:
    """A sample as `test.py --predictions` writes it; IoU at the image's own size."""
    image = refer.Imgs[ref["image_id"]]
    inter, union = int((truth & result).sum()), int((truth | result).sum())
    same = [a for a in refer.imgToAnns[ref["image_id"]] if a["category_id"] == ref["category_id"]]
    return {
        "split": split,
        **{name: ref[name] for name in ("ref_id", "ann_ids", "image_id", "category_id")},
        "sent_ids": [sentence["sent_id"]],
        "sentence": sentence["raw"],
        "category": refer.Cats[ref["category_id"]],
        "file_name": image["file_name"],
        "height": image["height"],
        "width": image["width"],
        "same_category": len(same) - 1,
        "iou": inter / union if union else 0.0,
        "intersection": inter,
        "union": union,
        "score": 0.75 if result.any() else 0.0,
        "segmentation": rle(result),
        "truth": rle(truth),
        "protocol": "standard",
    }


def lines_of(refer: REFER, splits: Sequence[str], seed: int = 0) -> Iterator[Line]:
    """A line for every expression of the splits."""
    rng = np.random.default_rng(seed)
    for split in splits:
        for ref in refer.loadRefs(refer.getRefIds(split=split)):
            truth = refer.getMask(ref)["mask"] == 1
            for sentence in ref["sentences"]:
                yield line(ref, refer, split, sentence, truth, guess(truth, rng))


def cc0_lines(seed: int = 0) -> list[Line]:
    """25 lines of the committed images."""
    return list(lines_of(REFER(CC0_ROOT, "refcoco", "unc"), ("train", "val", "testA"), seed))


def write_lines(path: Path, lines: Sequence[Line]) -> Path:
    """Write them, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path
