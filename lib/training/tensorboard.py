"""TensorBoard, for runs with --tensorboard; nothing else loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lib import visualize
from lib.errors import InputError
from utils import log, make_folder


class Board:
    """Writes to TensorBoard.

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

    def add_scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers by name; on a full disk they are missing, but training goes on."""
        try:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except OSError as e:
            log.warning("TensorBoard's file lacks step %d: %s", step, e.strerror)

    def add_images(self, name: str, images: Sequence[tuple[Image.Image, str]], step: int) -> None:
        """Write images with their expressions below them."""
        try:
            for i, (image, expression) in enumerate(images):
                pixels = np.asarray(visualize.caption(image, expression))
                self.writer.add_image(f"{name}/{i}", pixels, step, dataformats="HWC")
            self.writer.flush()
        except OSError as e:
            log.warning("TensorBoard's file lacks images of step %d: %s", step, e.strerror)
