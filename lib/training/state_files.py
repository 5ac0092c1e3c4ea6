"""The checkpoint files of a training run, and which of them is the newest usable one."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from lib.checkpoint import TRAINING_STATE, read_checkpoint, write_partial
from lib.errors import InputError


class StateFiles:
    """The checkpoints of one run in ``--output_dir``; written by rank 0 alone.

    - ``model_last``: the newest state, replaced by each save.
    - ``model_previous``: the one before it, in case ``model_last`` is damaged.
    - ``model_best``: the state after the best epoch.
    - ``model_nonfinite``: the state when a step that is not finite was noticed, for inspection; on
      a GPU that is up to ``--print_freq`` steps later.

    Args:
        folder: the output folder.
        model_id: name of the run.
    """

    def __init__(self, folder: str | os.PathLike[str], model_id: str) -> None:
        self.last, self.previous, self.best, self.nonfinite = (
            Path(folder) / f"model_{which}_{model_id}.pth"
            for which in ("last", "previous", "best", "nonfinite")
        )

    def save(self, content: dict[str, Any], *, best: bool = False) -> None:
        """Write ``model_last`` and, if ``best``, the same as ``model_best``.

        A process killed at any moment leaves each file either unchanged or complete.
        ``model_best`` comes first: a run resumed from the older ``model_last`` writes it again.

        Raises:
            InputError: it cannot be written; the existing files stay.
        """
        partial = write_partial(content, self.last)
        try:
            if best:
                _link(partial, self.best)
            if self.last.exists():
                _link(self.last, self.previous)
            os.replace(partial, self.last)
            _sync_folder(self.last.parent)
        except OSError as e:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise InputError(
                f"cannot write {self.last} ({e.strerror}): free some space or change --output_dir"
            ) from e

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest file that a run can resume from, None if there is none.

        Returns:
            The file, and for each newer file the reason why it cannot be used.
        """
        reasons = []
        for path in (self.last, self.previous, self.best):
            if not path.exists():
                continue
            try:
                content = read_checkpoint(path)
            except InputError as e:
                reasons.append(str(e))
                continue
            if all(k in content for k in TRAINING_STATE):
                return path, reasons
            reasons.append(f"{path} holds weights only: it can be tested, not resumed")
        return None, reasons

    def rename_existing(self, keep: str | os.PathLike[str] = "") -> list[Path]:
        """Rename the files of an earlier run of this name, so that no run loses its own.

        Args:
            keep: a file that stays, because this run resumes from it.

        Returns:
            The new names.

        Raises:
            InputError: a file cannot be renamed.
        """
        states = [path for path in (self.last, self.previous, self.best) if path.exists()]
        kept = keep and Path(keep).exists()
        return [rename_existing(path) for path in states if not (kept and path.samefile(keep))]


def rename_existing(path: Path) -> Path:
    """Rename a file of an earlier run, so that a fresh run does not overwrite it.

    Returns:
        The new path, which did not exist.

    Raises:
        InputError: it cannot be renamed.
    """
    number = 1
    while (renamed := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    try:
        path.rename(renamed)
    except OSError as e:
        raise InputError(f"cannot rename {path} to {renamed.name}: {e.strerror}") from e
    return renamed


def _link(source: Path, name: Path) -> None:
    """Make ``name`` a hard link of ``source``, or a copy, replacing it atomically."""
    if name.exists() and name.samefile(source):
        return  # left by a save that was killed; os.replace would do nothing
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
    """Flush the new names to disk, if the system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
