"""What TensorBoard and Weights & Biases show of a run, under the same names in both.

Loaded with --tensorboard or --wandb only, and by rank 0 alone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from data.dataset_refer_bert import ReferDataset
from data.loaders import collate, prepare_batch
from lib import visualize
from lib.evaluation.evaluator import decide_mask, expression_logits
from lib.training.trainer import TENSORBOARD, Trainer

SCORES = ("oIoU", "mIoU", "cIoU", "gIoU", "N_acc", "T_acc", "Acc")
SHOWN = 4  # predictions of each validation


class Writer(Protocol):
    """Writes to one place; a failure is a line in the log, and training goes on."""

    def add_scalars(self, numbers: dict[str, float], step: int) -> None:
        """Write numbers by name."""

    def add_images(self, name: str, images: Sequence[tuple[Image.Image, str]], step: int) -> None:
        """Write images, each with an expression."""


class Trackers:
    """Hands numbers and images to writers.

    Args:
        writers: to write to.
        optimizer: of the run, for the learning rate of each group.
        samples: of a step, of all processes.
        amp: of predictions, see :func:`lib.runtime.autocast`.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        optimizer: torch.optim.Optimizer,
        samples: int,
        amp: str = "off",
    ) -> None:
        self.writers, self.optimizer, self.samples, self.amp = writers, optimizer, samples, amp

    def add(self, record: dict[str, Any]) -> None:
        """Write the numbers of a record of metrics.jsonl, at the record's step."""
        numbers = {k: float(v) for k, v in self._named(record).items() if type(v) in (int, float)}
        for writer in self.writers:
            writer.add_scalars(numbers, record["step"])

    def _named(self, record: dict[str, Any]) -> dict[str, Any]:
        group = "train" if record["kind"] == "step" else "epoch"
        named = {f"{group}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
        named |= {f"{group}/loss_{k}": v for k, v in record.get("losses", {}).items()}
        if record["kind"] == "step":
            groups = self.optimizer.param_groups
            for i, g in enumerate(groups):  # the schedule's factor is the same for all
                lr = record["lr"] * g["initial_lr"] / groups[0]["initial_lr"]
                named[f"train/lr_{g.get('name', i)}"] = lr
            pace = record["seconds_per_step"]
            named["train/images_per_second"] = self.samples / pace if pace else None
        val = record.get("val", {})
        named |= {f"val/{name}": val.get(name) for name in SCORES}
        return named | {f"val/P@{k}": v for k, v in val.get("precision", {}).items()}

    def show(self, model: nn.Module, dataset: ReferDataset, step: int) -> None:
        """Write predictions of some samples, the same ones each time."""
        chosen = np.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).astype(int)
        images = [draw_prediction(model, dataset, i, self.amp) for i in chosen.tolist()]
        for writer in self.writers:
            writer.add_images("val/predictions", images, step)


@torch.inference_mode()
def draw_prediction(
    model: nn.Module, dataset: ReferDataset, index: int, amp: str = "off"
) -> tuple[Image.Image, str]:
    """A sample's image with the ground truth, beside it with the prediction; and its expression."""
    model.eval()
    device = next(model.parameters()).device
    batch = collate([dataset[index]])
    image = Image.fromarray(batch["image"][0].permute(1, 2, 0).numpy())
    target = batch["target"][0].numpy()
    (logits,) = expression_logits(model, prepare_batch(batch, device), amp)
    drawn = [
        visualize.overlay(image, target, color=visualize.GROUND_TRUTH),
        visualize.overlay(image, decide_mask(logits).cpu().numpy()),
    ]
    sheet = Image.fromarray(np.concatenate([np.asarray(d) for d in drawn], axis=1))
    return sheet, dataset.records[index].expression


def open_trackers(trainer: Trainer, done: int, *, resumed: bool) -> Trackers:
    """The trackers that a run's flags ask for.

    Args:
        trainer: of the run; its ``arguments`` receive the run's id of Weights & Biases, which
            checkpoints thereby keep.
        done: number of steps the run has done.
        resumed: whether it goes on with a checkpoint.

    Raises:
        InputError: a package is missing, or cannot be used.
    """
    config, writers = trainer.config, list[Writer]()
    if config.tensorboard:
        from lib.training.tensorboard import Board

        writers.append(Board(trainer.folder / TENSORBOARD, done))
    if config.wandb is not None:
        from lib.training.wandb import Wandb

        before = trainer.model.trained_with if resumed else {}
        known = before.get("wandb_id") if before.get("model_id") == config.model_id else None
        if not re.fullmatch(r"[\w-]{1,64}", str(known or "")):
            known = secrets.token_hex(4)
        trainer.arguments["wandb_id"] = known
        writers.append(Wandb(config.wandb, str(known), trainer.folder, trainer.arguments))
    samples = config.batch_size * config.accumulate * trainer.info.world
    return Trackers(writers, trainer.optimizer, samples, config.amp)
