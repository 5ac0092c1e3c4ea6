"""What a model offers to training, evaluation and checkpoints."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lib.errors import InputError
from lib.losses import Loss, named_losses

if TYPE_CHECKING:
    from transformers import BertConfig, BertModel

State = dict[str, Tensor]

NO_DECAY = ("norm", "absolute_pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class Frozen:
    """Marks a parameter as deliberately not trained; ``reason`` is logged."""

    reason: str


class Segmenter(nn.Module, ABC):
    """A network that segments what an expression refers to in an image.

    A subclass is the network, and knows the groups of its own parameter names.

    Attributes:
        groups: names of the optimizer's parameter groups, in the order of the release.
        variant: flags and their values that names and shapes of weights need not show. Loading a
            checkpoint compares them with those that it was trained with.
        trained_with: flags of the checkpoint whose weights it has; {} if there are none.
        seen_images: ids of the images that they were trained on, see :mod:`data.seen`.
        text_config: of the BERT that :func:`lib.segmentation.build_model` was given.
    """

    groups: tuple[str, ...]
    variant: Mapping[str, str] = MappingProxyType({})
    trained_with: Mapping[str, Any] = MappingProxyType({})
    seen_images: Mapping[str, Tensor] = MappingProxyType({})
    text_config: BertConfig

    @abstractmethod
    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Segment.

        Args:
            image: (B, 3, H, W) float, normalised; any H and W.
            input_ids: (B, N_l) int64.
            attention_mask: (B, N_l), 1 = real token.

        Returns:
            (B, 2, H, W) logits of background and object; the mask is their argmax over dim 1.
        """

    def losses(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        target: Tensor,
        segmentation: Loss,
    ) -> dict[str, Tensor]:
        """Named scalars, whose sum training minimises.

        Args:
            image, input_ids, attention_mask: as in :meth:`forward`.
            target: (B, H, W) int64 in {0, 1}.
            segmentation: loss of (logits, target); its terms have the names of ``--loss``.
        """
        logits = at_least_float32(self(image, input_ids, attention_mask))
        return named_losses(segmentation, logits, target)

    @abstractmethod
    def parameter_group(self, name: str, lang_layers: int | None) -> str | Frozen | None:
        """The optimizer's group of a parameter of this model.

        Args:
            name: of the parameter.
            lang_layers: train the first so many BERT layers; None trains all of BERT.

        Returns:
            One of :attr:`groups`; Frozen if it is not trained; None if the name is unknown, which
            stops training with an error.
        """

    @abstractmethod
    def unused_parameters(self) -> dict[str, str]:
        """Parameters that no output depends on, with the reason.

        They need no gradient, but stay in their groups, as in published optimizer states.
        """

    @abstractmethod
    def swin_name(self, name: str) -> str | None:
        """The name of a weight in ImageNet Swin checkpoints; None if it is not in them."""

    @abstractmethod
    def load_text(self, bert: BertModel) -> None:
        """Copy the weights of a pretrained BERT into the text encoder.

        Raises:
            InputError: shapes differ.
        """

    def to_published(self) -> dict[str, State]:
        """The weights as entries of a checkpoint, in the published layout."""
        return {"model": self.state_dict()}

    def from_published(self, state: Mapping[str, Tensor]) -> State:
        """A published state dict with exactly the names of this model's own.

        Args:
            state: flat, without ``module.`` prefixes; ``lavt``'s separate BERT is under
                ``text_encoder.``.
        """
        return dict(state)


def fill_text(module: nn.Module, pretrained: nn.Module) -> None:
    """Copy the weights of a part of a pretrained BERT.

    Raises:
        InputError: shapes differ.
    """
    try:
        module.load_state_dict(pretrained.state_dict())
    except RuntimeError as e:
        raise InputError("the BERT weights do not fit the width or vocabulary asked for") from e


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32: losses are computed in float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decay_group(name: str) -> str:
    """The group of a backbone parameter: norms, positions and bias tables have no decay."""
    return "backbone_no_decay" if any(part in name for part in NO_DECAY) else "backbone"


def bert_group(name: str, lang_layers: int | None, group: str) -> str | Frozen | None:
    """The group of a parameter of BERT: embeddings and later layers are frozen, as published.

    Args:
        name: within BERT.
        lang_layers: as in :meth:`Segmenter.parameter_group`.
        group: of the trained parameters.
    """
    layer = re.match(r"encoder\.layer\.(\d+)\.", name)
    if lang_layers is None or (layer and int(layer[1]) < lang_layers):
        return group
    if layer:
        return Frozen(f"--lang_layers {lang_layers}: of BERT only the first {lang_layers} train")
    if name.startswith("embeddings."):
        return Frozen(f"--lang_layers {lang_layers}: BERT's embeddings are not trained")
    return None


class Objective(nn.Module):
    """A model with its loss: the one module that training calls (and DDP wraps).

    Args:
        model: of which :meth:`Segmenter.losses` is computed.
        loss: the segmentation loss.
    """

    def __init__(self, model: Segmenter, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Named losses, each a scalar.

        Args:
            batch: image (B, 3, H, W) float, input_ids and attention_mask (B, N_l), target
                (B, H, W) int64.
        """
        return self.model.losses(
            batch["image"],
            batch["input_ids"],
            batch["attention_mask"],
            batch["target"],
            self.loss,
        )
