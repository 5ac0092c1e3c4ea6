"""Weights & Biases, for runs with --wandb; nothing else loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lib.errors import InputError
from utils import log, make_folder


class Wandb:
    """Writes to a run of Weights & Biases.

    ``WANDB_MODE=offline`` writes to the run's folder alone, ``disabled`` nowhere.

    Args:
        project: of the run.
        run_id: the same one continues a run; steps that it has already are left out.
        folder: of the run, whose name is shown.
        arguments: flags of the run.

    Raises:
        InputError: the package is not installed, or does not start.
    """

    def __init__(
        self, project: str, run_id: str, folder: Path, arguments: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as e:
            raise InputError("--wandb needs a package: pip install wandb") from e
        make_folder(folder)
        self.wandb = wandb
        try:
            self.run = wandb.init(
                project=project,
                id=run_id,
                name=folder.name,
                dir=str(folder),
                config=dict(arguments),
                resume="allow",
            )
        except Exception as e:  # its errors are of many kinds
            reason = " ".join(str(e).split())[:200]
            raise InputError(f"--wandb does not start ({reason}): try WANDB_MODE=offline") from e

    def add_scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        self._log(dict(numbers), step)

    def add_images(self, name: str, images: Sequence[tuple[Image.Image, str]], step: int) -> None:
        """Write images with their expressions."""
        self._log({name: [self.wandb.Image(i, caption=text) for i, text in images]}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        try:
            self.run.log(values, step=step)
        except Exception as e:  # training goes on
            log.warning("Weights & Biases lacks step %d: %s", step, e)
