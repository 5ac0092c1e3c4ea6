"""Write the predictions of every sample: one JSON object per line, in the dataset's order.

Every rank writes its own part; at the end the parts are merged line by line, so that no process
holds them all. `tools/report/records.py` reads the file. Its lines are COCO results.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import utils
from data.dataset_refer_bert import ReferDataset
from lib.errors import InputError
from lib.evaluation.evaluator import SamplePrediction
from utils import DistInfo, log

SCORE_DIGITS = 6


def line(about: dict[str, Any], prediction: SamplePrediction, protocol: str) -> dict[str, Any]:
    """A line of the file.

    Args:
        about: of :meth:`data.dataset_refer_bert.ReferDataset.describe`, and ``kind`` if known.
        prediction: of the sample.
        protocol: its label.
    """
    iou = prediction.intersection / prediction.union if prediction.union else 0.0
    if "no_target" in about:
        about = about | {"predicted_no_target": prediction.predicted_no_target}
    return {
        **about,
        "iou": iou,
        "intersection": prediction.intersection,
        "union": prediction.union,
        "score": round(prediction.score, SCORE_DIGITS),
        "segmentation": prediction.mask,
        "truth": prediction.ground_truth,
        "protocol": protocol,
    }


class PredictionsFile:
    """Writes the predictions of one split after another, from all ranks, in the samples' order.

    Use it as a context manager: at its end the ranks' parts become one file, written atomically;
    after an error they are removed.

    Args:
        path: of the file; None writes nothing.
        protocol: label of the evaluation's protocol.
        info: this process.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, protocol: str, info: DistInfo) -> None:
        self.path = None if path is None else Path(path)
        self.protocol, self.info = protocol, info
        self.before = 0  # samples of the splits before this one
        self.file: IO[str] | None = None

    def __enter__(self) -> PredictionsFile:
        if self.path is not None:
            with _writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(_part(self.path, self.info.rank), "w", encoding="ascii")
        return self

    def writer(self, dataset: ReferDataset) -> Callable[[SamplePrediction], None] | None:
        """The function that writes the predictions of the next split; None without a file."""
        if self.file is None:
            return None
        first, kinds = self.before, dataset.sample_kinds()
        self.before += len(dataset)

        def write(prediction: SamplePrediction) -> None:
            kind = kinds[prediction.sample]
            about = dataset.describe(prediction.sample) | ({"kind": kind} if kind else {})
            self.write(first + prediction.sample, line(about, prediction, self.protocol))

        return write

    def write(self, place: int, content: dict[str, Any]) -> None:
        """Write one line, numbered by its place in the merged file."""
        assert self.path is not None
        assert self.file is not None
        with _writing(self.path):
            # JSON escapes keep line breaks and invalid characters of an expression out of the file.
            self.file.write(f"{place}\t{json.dumps(content, allow_nan=False)}\n")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.path is None or self.file is None:
            return
        try:
            with _writing(self.path):
                self.file.close()
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()
            return
        utils.barrier()
        if self.info.is_main:
            _merge_parts(self.path, self.info.world)
            log.info("written: %s", self.path)

    def _remove(self) -> None:
        assert self.path is not None
        with contextlib.suppress(OSError):
            _part(self.path, self.info.rank).unlink()


def _merge_parts(path: Path, parts: int) -> None:
    """Merge the ranks' parts by place, and remove them.

    Raises:
        InputError: a part is missing, or the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    paths = [_part(path, rank) for rank in range(parts)]
    if missing := [part for part in paths if not part.is_file()]:
        raise InputError(f"{missing[0]} is missing: all processes must see one file system")
    with _writing(path), contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, "rb")) for part in paths]
        merged = stack.enter_context(open(partial, "wb"))
        # Samples of an image were evaluated one after the other, so the places are in no order.
        for _, number, offset in sorted(_placed(files)):
            files[number].seek(offset)
            merged.write(files[number].readline().partition(b"\t")[2])
        merged.flush()
        os.replace(partial, path)
    for part in path.parent.glob(f"{glob.escape(path.name)}.part*"):
        part.unlink(missing_ok=True)


def _placed(files: Sequence[IO[bytes]]) -> Iterator[tuple[int, int, int]]:
    """The place of each line, the number of its file and where it starts there."""
    for number, file in enumerate(files):
        offset = 0
        for text in file:
            yield int(text.partition(b"\t")[0]), number, offset
            offset += len(text)


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.part{number}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
