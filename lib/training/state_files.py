"""The state files of a training run: which there are, and which is the newest good one."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from lib.checkpoint import TRAINING_STATE, read_file, write_partial
from lib.errors import InputError


class StateFiles:
    """Files of one run in ``--output-dir``; written by the main process alone.

    - ``model_last``: the newest state, replaced by each save.
    - ``model_previous``: the one before, should the disk damage the newest.
    - ``model_best``: that of the best epoch.
    - ``model_nonfinite``: a state for inspection, of a step whose numbers went wrong.

    Args:
        folder: the output folder.
        model_id: names the run.
    """

    def __init__(self, folder: str | os.PathLike[str], model_id: str) -> None:
        self.last, self.previous, self.best, self.nonfinite = (
            Path(folder) / f"model_{which}_{model_id}.pth"
            for which in ("last", "previous", "best", "nonfinite")
        )

    def save(self, content: dict[str, Any], *, best: bool = False) -> None:
        """Write ``model_last``, and the same as ``model_best``.

        A process killed at any moment leaves each name either as it was or whole. ``model_best``
        comes first: a run that continues from the older ``model_last`` makes it again.

        Raises:
            InputError: it cannot be written; the files that were there stay.
        """
        partial = write_partial(content, self.last)
        try:
            if best:
                _second_name(partial, self.best)
            if self.last.exists():
                _second_name(self.last, self.previous)
            os.replace(partial, self.last)
            _sync_folder(self.last.parent)
        except OSError as e:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise InputError(
                f"cannot write {self.last} ({e.strerror}): free some space or change --output-dir"
            ) from e

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest file that a run can continue from, None if there is none.

        Returns:
            The file, and a sentence for each newer one that is of no use.
        """
        complaints = []
        for path in (self.last, self.previous, self.best):
            if not path.exists():
                continue
            try:
                content = read_file(path)
            except InputError as e:
                complaints.append(str(e))
                continue
            if all(k in content for k in TRAINING_STATE):
                return path, complaints
            complaints.append(f"{path} holds weights only: it can be tested, not resumed")
        return None, complaints

    def set_aside(self, keep: str | os.PathLike[str] = "") -> list[Path]:
        """Rename the files of an earlier run of this name, so that neither run loses its own.

        Args:
            keep: a file that stays, because this run continues from it.

        Returns:
            The new names.

        Raises:
            InputError: a file cannot be renamed.
        """
        states = [path for path in (self.last, self.previous, self.best) if path.exists()]
        kept = keep and Path(keep).exists()
        return [set_aside(path) for path in states if not (kept and path.samefile(keep))]


def set_aside(path: Path) -> Path:
    """Rename an older run's file, so that a fresh run does not write over it.

    Returns:
        The new name, which no file had.

    Raises:
        InputError: it cannot be renamed.
    """
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    try:
        path.rename(aside)
    except OSError as e:
        raise InputError(f"cannot rename {path} to {aside.name}: {e.strerror}") from e
    return aside


def _second_name(source: Path, name: Path) -> None:
    """Let ``name`` be the file ``source`` too, replacing what it was at one moment."""
    if name.exists() and name.samefile(source):
        return  # as a save that was cut short left it; renaming one onto the other does nothing
    link = name.with_name(name.name + ".partial")
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    try:
        os.link(source, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, link)
        with open(link, "rb") as f:
            os.fsync(f.fileno())
    os.replace(link, name)


def _sync_folder(folder: Path) -> None:
    """Have the new names survive a power cut, where the system can promise it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
