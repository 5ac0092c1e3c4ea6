"""Ablations of LAVT: forms of PWAM, gate, norm and decoder input (LAVT, Sec. 4.4).

Defaults are the published network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lib.errors import InputError
from lib.fusion import ATTENTIONS, COMBINE, NORMS, PWAM, LanguageGate, TokenConv1d

GATES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "none": nn.Identity,
}


def concat(vis: Tensor, mean: Tensor) -> Tensor:
    """(B, HW, C) and (B, 1, C) -> (B, HW, 2C)."""
    return torch.cat([vis, mean.expand_as(vis)], dim=-1)


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "concat": concat,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "lang_path": ("on", "off"),
    "gate": (*GATES, "off"),
    "fusion": ("pwam", *JOINS),
    "pwam_attention": tuple(ATTENTIONS),
    "pwam_combine": tuple(COMBINE),
    "pwam_norm": tuple(NORMS),
    "decoder_features": ("F", "V"),
}
ONE_HEAD = "1-1-1-1"


@dataclass(frozen=True)
class Variant:
    """A form of LAVT; the fields are flags of train.py.

    Attributes:
        lang_path: 'off': V' = V, the next stage gets no fused features.
        gate: activation of the gate, V' = V + act(W2 ReLU(W1 F)) * F; 'none' for no activation,
            'off' for no gate: V' = V + F.
        fusion: 'pwam', or how every pixel is joined with the mean of the words: 'add', 'mul',
            'concat'.
        pwam_attention: 'softmax' over the words, or 'sigmoid' of each word.
        pwam_combine: how PWAM joins pixels and their language features: 'mul', 'add', or 'words',
            the language features only.
        pwam_norm: of PWAM's queries and language features.
        decoder_features: the decoder's input, F or V'.

    Raises:
        InputError: an unknown value, or one that has no effect because of the others.
    """

    lang_path: str = "on"
    gate: str = "tanh"
    fusion: str = "pwam"
    pwam_attention: str = "softmax"
    pwam_combine: str = "mul"
    pwam_norm: str = "instance"
    decoder_features: str = "F"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value not in CHOICES[name]:
                raise InputError(f"--{name} {value}: choose one of {', '.join(CHOICES[name])}")
        for name, value in self.changed().items():
            if self.lang_path == "off" and name in ("gate", "decoder_features"):
                raise InputError(
                    f"--{name} {value} has no meaning with --lang_path off: leave one of them out"
                )
            if self.fusion != "pwam" and name.startswith("pwam_"):
                raise InputError(
                    f"--{name} {value} has no meaning with --fusion {self.fusion}: "
                    "leave one of them out"
                )

    def changed(self) -> dict[str, str]:
        """The fields that differ from the published network, with their values."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def flags(self) -> str:
        """The same as on a command line."""
        return " ".join(f"--{name} {value}" for name, value in self.changed().items())

    def build_fusion(self, dim: int, lang_dim: int, heads: int, dropout: float) -> nn.Module:
        """Module of ((B, HW, C), (B, N_l, C_l), (B, N_l)) -> (B, HW, C); C is ``dim``."""
        if self.fusion != "pwam":
            return MeanFusion(dim, lang_dim, self.fusion, dropout)
        attention, combine, norm = self.pwam_attention, self.pwam_combine, self.pwam_norm
        return PWAM(dim, lang_dim, heads, dropout, attention, combine, norm)

    def build_gate(self, dim: int) -> nn.Module | None:
        """Module of F (..., C) whose output is multiplied by F; None for V' = V."""
        if self.lang_path == "off":
            return None
        return OpenGate() if self.gate == "off" else LanguageGate(dim, GATES[self.gate]())


PUBLISHED = Variant()


class OpenGate(nn.Module):
    """Replaces the gate by the constant 1: V' = V + F."""

    def forward(self, fused: Tensor) -> Tensor:
        """(..., C) -> scalar 1."""
        return fused.new_ones(())


class MeanFusion(nn.Module):
    """Fusion with the mean of the words: GELU(Conv(join(GELU(Conv(V)), Conv(mean)))).

    Args:
        vis_dim: channels C of the stage.
        lang_dim: channels C_l of the word features.
        join: a key of :data:`JOINS`.
        dropout: after each projection, as in PWAM.
    """

    def __init__(self, vis_dim: int, lang_dim: int, join: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.join = JOINS[join]
        joined = 2 * vis_dim if join == "concat" else vis_dim
        self.vis_project = nn.Sequential(
            TokenConv1d(vis_dim, vis_dim), nn.GELU(), nn.Dropout(dropout)
        )
        self.lang_project = nn.Sequential(TokenConv1d(lang_dim, vis_dim))
        self.project_mm = nn.Sequential(
            TokenConv1d(joined, vis_dim), nn.GELU(), nn.Dropout(dropout)
        )

    def forward(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Arguments and result as in :meth:`lib.fusion.PWAM.forward`."""
        mask = lang_mask[..., None].to(lang.dtype)
        count = mask.sum(1, keepdim=True).clamp(min=1)  # without words the mean is zero
        mean = (lang * mask).sum(1, keepdim=True) / count  # (B, 1, C_l)
        return self.project_mm(self.join(self.vis_project(vis), self.lang_project(mean)))


def trained_with(recorded: Mapping[str, Any], asked: Mapping[str, str]) -> dict[str, str]:
    """Values of the flags ``asked`` that a checkpoint was trained with.

    Args:
        recorded: flags of the checkpoint. Without these, as in published files, it is of the
            published network.
        asked: of :attr:`lib.model.Segmenter.variant`.
    """
    published = asdict(PUBLISHED) | {"mha": ONE_HEAD}
    # An untrusted file may have any object under these names.
    texts = {name: value for name, value in recorded.items() if isinstance(value, str)}
    return {name: texts.get(name) or published[name] for name in asked} if recorded else {}
