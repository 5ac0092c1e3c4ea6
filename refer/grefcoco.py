"""Read gRefCOCO: ``grefs(unc).p`` or ``grefs(unc).json``, and ``instances.json``.

A reference has any number of annotations; ``ann_id`` [-1] is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import InputError
from refer.images import MAX_PIXELS
from refer.instances import Record, load_instances, read_json
from refer.pickles import check_refs, unpickle


def find(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The file of the references, the pickle if there are both, and ``instances.json``.

    Raises:
        InputError: there is neither.
    """
    return find_either(folder, f"grefs({split_by}).p", f"grefs({split_by}).json")


def find_either(folder: Path, *names: str) -> tuple[Path, Path]:
    """The first of two files of references that exists, and ``instances.json``.

    Raises:
        InputError: there is neither.
    """
    paths = [folder / name for name in names]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise InputError(f"neither {paths[0]} nor {paths[1].name} exists; see docs/datasets.md")
    return there[0], folder / "instances.json"


def read(files: tuple[Path, Path], max_pixels: int = MAX_PIXELS) -> dict[str, list[Record]]:
    """The records: refs, images, annotations, categories.

    Raises:
        InputError: a file is damaged.
    """
    path, instances = files
    content = unpickle(path) if path.suffix == ".p" else read_json(path)
    refs = check_refs(content, path)
    tables = load_instances(instances, max_pixels)
    sizes = {image["id"]: [image["height"], image["width"]] for image in tables["images"]}
    needed = {ann_id for ref in refs for ann_id in ref["ann_ids"]}
    for annotation in tables["annotations"]:
        if annotation["id"] in needed and annotation["image_id"] in sizes:
            size = sizes[annotation["image_id"]]
            annotation["segmentation"] = drawn_part(annotation, size)
    return {"refs": refs, **tables}


def drawn_part(annotation: Record, size: list[int]) -> Any:
    """What of an annotation belongs to a target, as the published evaluation draws it.

    Nothing of a crowd, and no polygon of an odd length or of fewer than six numbers.

    Args:
        annotation: a record of ``instances.json``.
        size: height and width of its image.
    """
    parts = annotation.get("segmentation")
    if isinstance(parts, list):
        parts = [p for p in parts if not isinstance(p, list) or (len(p) >= 6 and len(p) % 2 == 0)]
    if annotation.get("iscrowd") or parts == []:
        return {"size": size, "counts": [size[0] * size[1]]}  # run lengths of an empty mask
    return parts
