"""Writes the same small data in each form that refer.convert reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from refer.refer import REFER

Mask = npt.NDArray[np.bool_]


class OwnData:
    """The references of RefShapes scenes: images, polygons, masks and expressions.

    Args:
        root: a generated REFER root.
        folder: `photos/`, `coco/`, `labelme/` and `parquet/` are written here.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.refer = REFER(root, "refcoco", "unc")
        self.folder = folder
        self.photos = folder / "photos"
        (self.photos / "masks").mkdir(parents=True)
        self.refs = self.refer.loadRefs()
        for image_id in self.refer.getImgIds(self.refer.getRefIds()):
            with Image.open(self.refer.image_path(image_id)) as image:
                image.save(self.photos / self.image(image_id), quality=95)
        for ref in self.refs:
            Image.fromarray(self.mask(ref)).save(self.photos / self.mask_name(ref))

    def image(self, image_id: int) -> str:
        return f"{image_id}.jpg"

    def mask_name(self, ref: dict[str, Any]) -> str:
        return f"masks/{ref['ann_ids'][0]}.png"

    def mask(self, ref: dict[str, Any]) -> Mask:
        return self.refer.getMask(ref)["mask"] > 0

    def texts(self, ref: dict[str, Any]) -> list[str]:
        return [sentence["raw"] for sentence in ref["sentences"]]

    def masks_by_text(self) -> dict[tuple[str, str], Mask]:
        """The mask of each expression, by image and expression."""
        return {
            (self.image(ref["image_id"]), text): self.mask(ref)
            for ref in self.refs
            for text in self.texts(ref)
        }

    def write_jsonl(self) -> Path:
        lines = []
        for ref in self.refs:
            line = {"image": self.image(ref["image_id"]), "expressions": self.texts(ref)}
            lines.append(json.dumps(line | {"mask": self.mask_name(ref)}))
        path = self.photos / "expressions.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    def write_coco(self) -> tuple[Path, Path]:
        folder = self.folder / "coco"
        folder.mkdir()
        images = [image | {"file_name": self.image(image["id"])} for image in self.refer.loadImgs()]
        tables = {"images": images, "annotations": self.refer.loadAnns(), "categories": []}
        (folder / "annotations.json").write_text(json.dumps(tables))
        rows = [[ref["ann_ids"][0], text] for ref in self.refs for text in self.texts(ref)]
        write_csv(folder / "expressions.csv", [["ann_id", "expression"], *rows])
        return folder / "annotations.json", folder / "expressions.csv"

    def write_labelme(self) -> Path:
        folder = self.folder / "labelme"
        folder.mkdir()
        for image in self.refer.loadImgs():
            shapes = []
            for ref in self.refer.imgToRefs[image["id"]]:
                (ann_id,) = ref["ann_ids"]
                for number, polygon in enumerate(self.refer.Anns[ann_id]["segmentation"]):
                    points = np.reshape(polygon, (-1, 2)).tolist()
                    text = "" if number else "\n".join(self.texts(ref))
                    shape = {"label": self.texts(ref)[0], "description": text, "points": points}
                    shapes.append(shape | {"group_id": ann_id, "shape_type": "polygon"})
            record = {"imagePath": f"..\\photos\\{self.image(image['id'])}", "shapes": shapes}
            record |= {"imageWidth": image["width"], "imageHeight": image["height"]}
            (folder / f"{image['id']}.json").write_text(json.dumps(record))
        return folder

    def write_masks(self) -> Path:
        rows = [
            [self.image(ref["image_id"]), self.mask_name(ref), text]
            for ref in self.refs
            for text in self.texts(ref)
        ]
        path = self.photos / "masks.csv"
        write_csv(path, [["image", "mask", "expression"], *rows])
        return path

    def write_parquet(self) -> Path:
        import pyarrow
        from pyarrow import parquet

        folder = self.folder / "parquet"
        folder.mkdir()
        rows = []
        for ref in self.refs:
            (ann_id,) = ref["ann_ids"]
            row = {key: value for key, value in ref.items() if key != "ann_ids"}
            row["raw_anns"] = json.dumps(self.refer.Anns[ann_id])
            row["raw_image_info"] = json.dumps(self.refer.Imgs[ref["image_id"]])
            rows.append(row | {"bbox": [1.0, 2.0, 3.0, 4.0]})
        for name, split in (("train", "train"), ("validation", "val"), ("test", "testA")):
            part = [row | {"split": name} for row in rows if row["split"] == split]
            parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{name}-0.parquet")
        part = [row for row in rows if row["split"] == "testB"]
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / "testB-0.parquet")
        return folder


def write_csv(path: Path, rows: Sequence[Sequence[object]], separator: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
