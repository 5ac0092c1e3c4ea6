"""What every model offers to the scripts, so that adding one takes one file and one line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lib.cpu import kernels
from lib.errors import InputError
from lib.losses import Loss

if TYPE_CHECKING:
    from transformers import BertModel

State = dict[str, Tensor]

NO_DECAY = ("norm", "absolute_pos_embed", "relative_position_bias_table")


class Segmenter(nn.Module, ABC):
    """A network that cuts out of a picture what a sentence means.

    A subclass has the network and answers a few questions about it, all in terms of its own
    parameter names; training, evaluation and checkpoints need no more.

    Attributes:
        groups: names of the optimizer's parameter groups, in the order of the release.
        shares_pictures: whether :meth:`forward` takes ``of_picture``.
        variant: options that were asked for, by name, which a checkpoint's names and shapes need
            not tell: loading compares them with the options that the checkpoint was trained with.
    """

    groups: tuple[str, ...]
    shares_pictures = False
    variant: Mapping[str, str] = MappingProxyType({})

    def train(self, mode: bool = True) -> Segmenter:
        """Set train or evaluation mode; what was made of the weights is made afresh after it."""
        kernels.forget()
        return super().train(mode)

    @abstractmethod
    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        of_picture: Tensor | None = None,
    ) -> Tensor:
        """Segment what the sentences mean.

        Args:
            image: (B, 3, H, W) float, normalised; any H and W.
            input_ids: (B, N_l) int64.
            attention_mask: (B, N_l), 1 = real token.
            of_picture: (B,) int64, which of the pictures each sentence is about, where there are
                fewer pictures than sentences: what depends on no sentence is then computed once
                a picture. None: each sentence has its own. A model without
                :attr:`shares_pictures` is not given it, and need not take it.

        Returns:
            (B, 2, H, W) logits of background and object; the mask is their argmax over dim 1.
        """

    def objective(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        target: Tensor,
        segmentation: Loss,
    ) -> Tensor:
        """The scalar that training minimises.

        Args:
            image, input_ids, attention_mask: as in :meth:`forward`.
            target: (B, H, W) int64 in {0, 1}.
            segmentation: loss of (logits, target).
        """
        return segmentation(at_least_float32(self(image, input_ids, attention_mask)), target)

    @abstractmethod
    def parameter_group(self, name: str, lang_layers: int | None) -> str | None:
        """The optimizer's group of a parameter, None for those that are not updated.

        Args:
            name: of a parameter of this model.
            lang_layers: train the first so many BERT layers; None trains all of BERT.
        """

    @abstractmethod
    def unused_parameters(self) -> list[str]:
        """Names of the parameters that no output depends on."""

    @abstractmethod
    def swin_name(self, name: str) -> str | None:
        """What an ImageNet Swin calls a weight of this model (official layout), None if nothing."""

    @abstractmethod
    def load_text(self, bert: BertModel) -> None:
        """Fill the text encoder with a pretrained BERT, of ``bert``'s own configuration.

        Raises:
            InputError: it does not fit.
        """

    def to_published(self) -> dict[str, State]:
        """The weights as entries of a checkpoint, in the published layout."""
        return {"model": self.state_dict()}

    def from_published(self, state: Mapping[str, Tensor]) -> State:
        """A published state dict, with what this model's own always holds and no more.

        Args:
            state: flat, without ``module.`` prefixes; ``lavt``'s separate BERT already joined
                under ``text_encoder.``.
        """
        return dict(state)


def fill_text(module: nn.Module, pretrained: nn.Module) -> None:
    """Copy the weights of a part of a pretrained BERT.

    Raises:
        InputError: they are of another shape.
    """
    try:
        module.load_state_dict(pretrained.state_dict())
    except RuntimeError as e:
        raise InputError("the BERT weights do not fit the width or vocabulary asked for") from e


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 or better, whatever the forward pass ran in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decay_group(name: str) -> str:
    """The group of a backbone parameter: norms, positions and bias tables are not decayed."""
    return "backbone_no_decay" if any(part in name for part in NO_DECAY) else "backbone"


class Objective(nn.Module):
    """A model together with its loss, as the one module that trains (and that DDP wraps).

    Args:
        model: whose :meth:`Segmenter.objective` is computed.
        loss: the segmentation loss.
    """

    def __init__(self, model: Segmenter, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scalar loss of a batch {image, input_ids, attention_mask, target}."""
        return {
            "seg": self.model.objective(
                batch["image"],
                batch["input_ids"],
                batch["attention_mask"],
                batch["target"],
                self.loss,
            )
        }
