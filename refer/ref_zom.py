"""Read Ref-ZOM: ``refs(final).p``, or ``Ref-ZOM(final).p`` as downloaded, and ``instances.json``.

A reference whose ``source`` is 'zero' has no target; others have one or several annotations.
"""

from __future__ import annotations

from pathlib import Path

from lib.errors import InputError
from refer.images import MAX_PIXELS
from refer.instances import Record, load_instances
from refer.pickles import check_refs, unpickle


def find(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The pickle and ``instances.json``.

    Raises:
        InputError: there is no pickle.
    """
    paths = [folder / f"{name}({split_by}).p" for name in ("refs", "Ref-ZOM")]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise InputError(f"neither {paths[0]} nor {paths[1].name} exists; see docs/datasets.md")
    return there[0], folder / "instances.json"


def read(files: tuple[Path, Path], max_pixels: int = MAX_PIXELS) -> dict[str, list[Record]]:
    """The records: refs, images, annotations, categories.

    Raises:
        InputError: a file is damaged.
    """
    refs = unpickle(files[0])
    for ref in refs if isinstance(refs, list) else ():
        if isinstance(ref, dict) and ref.get("source") == "zero":
            ref |= {"ann_id": [], "ann_ids": []}
            if type(ref.get("category_id")) is not int:
                ref["category_id"] = -1
    return {"refs": check_refs(refs, files[0]), **load_instances(files[1], max_pixels)}
