"""Write what was predicted for each sample: one JSON object a line, in the data set's order.

Every process writes its own samples as they come; at the end the parts are merged, line by line,
so that no process ever holds them all. `tools/records.py` reads the file. A list of its lines is
a COCO results file.
"""

from __future__ import annotations

import contextlib
import glob
import heapq
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lib.errors import InputError
from lib.evaluation.evaluator import SamplePrediction

SCORE_DIGITS = 6


def line(about: dict[str, Any], answer: SamplePrediction, protocol: str) -> dict[str, Any]:
    """What the file says of a sample.

    Args:
        about: the sample, from the data set: ids, sentence, photo, and ``kind`` where known.
        answer: what was predicted and counted.
        protocol: 'standard', or what differs from it.
    """
    iou = answer.intersection / answer.union if answer.union else 0.0
    return {
        **about,
        "iou": iou,
        "intersection": answer.intersection,
        "union": answer.union,
        "score": round(answer.score, SCORE_DIGITS),
        "segmentation": answer.mask,
        "truth": answer.truth,
        "protocol": protocol,
    }


class Part:
    """One process' share of a file of predictions, beside that file while it is written.

    Args:
        path: of the whole file.
        number: of the share.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path = _part(path, number)
        self.file: IO[str]
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "w", encoding="ascii")  # noqa: SIM115

    def write(self, place: int, content: dict[str, Any]) -> None:
        """Add a line that belongs at ``place`` of the whole file; places come in rising order.

        Raises:
            InputError: it cannot be written.
        """
        with _writing(self.path):
            # Escapes keep a sentence's own line breaks and broken characters out of the file.
            self.file.write(f"{place}\t{json.dumps(content, allow_nan=False)}\n")

    def close(self) -> None:
        """Write what is still in memory.

        Raises:
            InputError: it cannot be written.
        """
        with _writing(self.path):
            self.file.close()

    def discard(self) -> None:
        """Remove the share of a run that failed."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()


def merge_parts(path: Path, parts: int) -> None:
    """Make the file of its closed parts, whole or not at all, and remove them.

    Args:
        path: of the file.
        parts: how many processes wrote one.

    Raises:
        InputError: a part cannot be read, or the file not be written.
    """
    partial = path.with_name(path.name + ".partial")
    paths = [_part(path, number) for number in range(parts)]
    if missing := [part for part in paths if not part.is_file()]:
        raise InputError(f"{missing[0]} is missing: all processes must see one file system")
    with _writing(path), contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, encoding="ascii")) for part in paths]
        whole = stack.enter_context(open(partial, "w", encoding="ascii"))
        for _, content in heapq.merge(*map(_placed, files)):
            whole.write(content)
        whole.flush()
        os.replace(partial, path)
    for part in path.parent.glob(f"{glob.escape(path.name)}.part*"):
        part.unlink(missing_ok=True)


def _placed(file: IO[str]) -> Iterator[tuple[int, str]]:
    for text in file:
        place, _, content = text.partition("\t")
        yield int(place), content


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.part{number}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
