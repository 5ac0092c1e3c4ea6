"""Read the parquet copies of RefCOCO, RefCOCO+ and RefCOCOg, which the Hugging Face hub has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from lib.errors import InputError

COLUMNS = ["sent_ids", "file_name", "ann_id", "ref_id", "image_id", "split", "sentences"]
COLUMNS += ["category_id", "raw_anns", "raw_image_info"]


def read_parquet(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """References and records with the published ids and polygons.

    The hub's `test` is testA where there is a testB.

    Raises:
        InputError: pyarrow is not installed, or a file is not such a copy.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError("parquet files need pyarrow: pip install pyarrow") from None
    refs: list[dict[str, Any]] = []
    images: dict[int, dict[str, Any]] = {}
    annotations: dict[int, dict[str, Any]] = {}
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise InputError(f"{path}: has no column '{missing[0]}'; is it a copy of RefCOCO?")
            for batch in file.iter_batches(columns=COLUMNS):
                for row in batch.to_pylist():
                    annotation = _parsed(row.pop("raw_anns"))
                    image = _parsed(row.pop("raw_image_info"))
                    row["sentences"] = [dict(sentence) for sentence in _parsed(row["sentences"])]
                    annotations[annotation["id"]] = annotation
                    images[image["id"]] = image | {"file_name": image["file_name"]}
                    refs.append(row)
        except (pyarrow.ArrowException, OSError) as e:
            reason = str(e).splitlines()[0][:120]
            raise InputError(f"{path}: is not a readable parquet file ({reason})") from None
        except (ValueError, TypeError, KeyError) as e:
            where = f"{path}, after reference {len(refs)}"
            raise InputError(f"{where}: not as in the copies ({type(e).__name__}: {e})") from None
    names = {"validation": "val"}
    if any(ref["split"] == "testB" for ref in refs):
        names["test"] = "testA"
    for ref in refs:
        ref["split"] = names.get(ref["split"], ref["split"])
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    tables = {
        "images": list(images.values()),
        "annotations": list(annotations.values()),
        "categories": [{"id": i, "name": name} for i, name in enumerate(coco) if name[0].islower()],
    }
    return refs, tables


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str | bytes) else value
