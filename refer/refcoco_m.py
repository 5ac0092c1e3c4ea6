"""Read RefCOCO-M, the re-annotated validation split of RefCOCO: parquet files, evaluation only.

    python -m refer.refcoco_m --refer_data_root refer/data    unpacks the images in the files

The images are those of COCO's train2014, which need not be unpacked where that is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import utils
from lib.errors import InputError
from refer.images import MAX_PIXELS, check_pixels
from refer.instances import Record, whole
from refer.names import parts_of
from refer.pickles import check_refs

NAME = "refcoco-m"
COLUMNS = ["image_id", "file_name", "samples"]


def find(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The folder, twice; all of its parquet files are read.

    Raises:
        InputError: it has none.
    """
    if not any(folder.rglob("*.parquet")):
        raise InputError(f"{folder} has no .parquet file; see docs/datasets.md")
    return folder, folder


def read(files: tuple[Path, Path], max_pixels: int = MAX_PIXELS) -> dict[str, list[Record]]:
    """The records: refs, images, annotations, categories; a sample is a reference.

    Raises:
        InputError: a file is damaged, or pyarrow is not installed.
    """
    folder = files[0]
    refs: list[Record] = []
    images: dict[int, Record] = {}
    annotations: list[Record] = []
    categories: dict[str, int] = {}
    expressions = 0
    for row in _rows(folder, COLUMNS):
        try:
            image_id = whole(row["image_id"])
            for sample in row["samples"]:
                height, width = map(int, sample["mask"]["size"])
                check_pixels(f"{folder}: image {image_id}", width, height, max_pixels)
                about = {"id": image_id, "file_name": str(row["file_name"])}
                images[image_id] = about | {"width": width, "height": height}
                number = len(refs) + 1
                name = str(sample["category"])
                category = categories.setdefault(name, len(categories) + 1)
                ids = {"image_id": image_id, "category_id": category}
                drawn = {"size": [height, width], "counts": _text(sample["mask"]["counts"])}
                annotations.append({"id": number, **ids, "segmentation": drawn})
                texts = [str(text) for text in sample["sentences"]]
                sentences = [
                    {"sent_id": expressions + i, "raw": text} for i, text in enumerate(texts)
                ]
                expressions += len(sentences)
                ref = {"ref_id": number, "ann_id": number, "split": "val", "sentences": sentences}
                refs.append(ref | ids)
        except (LookupError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {str(e)[:80]}"
            raise InputError(f"{folder}: not a row of RefCOCO-M ({reason})") from None
    return {
        "refs": check_refs(refs, folder),
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in categories.items()],
    }


def _text(counts: Any) -> str:
    return counts.decode("ascii", "replace") if isinstance(counts, bytes) else str(counts)


def _rows(folder: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of all files, a group at a time.

    Raises:
        InputError: a file is damaged or lacks a column, or pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("RefCOCO-M's parquet files need a package: pip install pyarrow") from None
    for path in sorted(folder.rglob("*.parquet")):
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                    if missing := set(columns) - set(batch.schema.names):
                        raise InputError(f"{path} has no column '{min(missing)}'")
                    yield from batch.to_pylist()
        except InputError:
            raise
        except Exception as e:  # pyarrow has many kinds
            reason = str(e).strip().splitlines() or [type(e).__name__]
            raise InputError(f"{path}: cannot be read ({reason[0][:100]})") from None


def unpack(root: Path) -> int:
    """Write the images in the files to ``images/refcoco-m`` below the data root.

    Returns:
        Number of images.

    Raises:
        InputError: a row has no image or a file name that is none, or a file cannot be written.
    """
    folder = root / "images" / NAME
    utils.make_folder(folder)
    count = 0
    source = find(root / NAME, "")[0]
    for row in utils.progress(_rows(source, ["file_name", "image"]), "images", 0):
        name, image = row["file_name"], row["image"]
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(name, str) or not parts_of(name) or not isinstance(content, bytes):
            raise InputError(f"{source}: row {count + 1} has no image, or no name for it")
        try:
            (folder / Path(name).name).write_bytes(content)
        except OSError as e:
            raise InputError(f"cannot write {folder / Path(name).name}: {e.strerror}") from e
        count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Unpack the images, as the command line says."""
    p = utils.Parser("python -m refer.refcoco_m", description="Unpack RefCOCO-M's images.")
    p.add_argument("--refer_data_root", type=Path, default=Path("./refer/data/"))
    args: argparse.Namespace = p.parse_args(argv)
    count = unpack(args.refer_data_root)
    print(f"written: {count} images in {args.refer_data_root / 'images' / NAME}")


if __name__ == "__main__":
    utils.run_script(main)
