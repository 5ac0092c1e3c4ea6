"""TensorBoard, for runs with --tensorboard; nothing else loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import InputError
from utils import log, make_folder


class Board:
    """Writes the numbers of metrics records to TensorBoard, each at the record's step.

    Args:
        folder: of the files.
        done: number of steps the run has done; later ones, of an interrupted run, are hidden.

    Raises:
        InputError: TensorBoard is not installed, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise InputError(
                "--tensorboard needs a package: pip install -r requirements-tools.txt"
            ) from e
        make_folder(folder)
        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def add(self, record: dict[str, Any]) -> None:
        """Write a record's numbers; on a full disk they are missing, but training goes on."""
        group = "train" if record["kind"] == "step" else "epoch"
        numbers = {f"{group}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
        numbers |= {f"{group}/loss_{k}": v for k, v in record.get("losses", {}).items()}
        for name in ("oIoU", "mIoU", "cIoU", "gIoU", "N_acc", "T_acc", "Acc"):
            numbers[f"val/{name}"] = record.get("val", {}).get(name)
        try:
            for name, value in numbers.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()
        except OSError as e:
            log.warning("TensorBoard's file lacks step %d: %s", record["step"], e.strerror)
