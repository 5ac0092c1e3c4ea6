"""Read Ref-ZOM: ``refs(final).p``, or ``Ref-ZOM(final).p`` as downloaded, and ``instances.json``.

A reference whose ``source`` is 'zero' has no target; others have one or several annotations.
"""

from __future__ import annotations

from pathlib import Path

from refer.grefcoco import find_either
from refer.images import MAX_PIXELS
from refer.instances import Record, load_instances
from refer.pickles import check_refs, unpickle


def find(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The pickle and ``instances.json``.

    Raises:
        InputError: there is no pickle.
    """
    return find_either(folder, f"refs({split_by}).p", f"Ref-ZOM({split_by}).p")


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
