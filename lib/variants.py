"""Ablations of LAVT as options: what stands in the place of PWAM, gate, norm and decoder input.

Defaults are the published network. The paper compares a language pathway with none, PWAM with a
plain fusion, activations of the gate, norms within PWAM, and features for the decoder.
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
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "concat": lambda vis, sentence: torch.cat([vis, sentence.expand_as(vis)], dim=-1),
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
    """Which LAVT: the published one, unless told otherwise. The fields are options of train.py.

    Attributes:
        lang_path: 'off' for V' = V: no fused feature goes on to the next stage.
        gate: activation after W2, V' = V + act(W2 ReLU(W1 F)) * F; 'none' for no activation,
            'off' for no gate: V' = V + F.
        fusion: 'pwam', or how the mean of the words joins every pixel alike: 'add', 'mul',
            'concat'.
        pwam_attention: 'softmax' over the words, or 'sigmoid' of each word alone.
        pwam_combine: how PWAM joins pixels with the words they gathered: 'mul', 'add', or
            'words', the gathered words alone.
        pwam_norm: of PWAM's queries and of the gathered words.
        decoder_features: what the decoder sees, F or V'.

    Raises:
        InputError: an unknown value, or one that has no effect beside the others.
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
        """The fields that differ from the published network."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def options(self) -> str:
        """The same as words of a command line."""
        return " ".join(f"--{name} {value}" for name, value in self.changed().items())

    def build_fusion(self, dim: int, lang_dim: int, heads: int, dropout: float) -> nn.Module:
        """Module of ((B, HW, C), (B, N_l, C_l), (B, N_l)) -> (B, HW, C); C is ``dim``."""
        if self.fusion != "pwam":
            return SentenceFusion(dim, lang_dim, self.fusion, dropout)
        forms = {
            "attention": self.pwam_attention,
            "combine": self.pwam_combine,
            "norm": self.pwam_norm,
        }
        return PWAM(dim, lang_dim, heads, dropout, **forms)

    def build_gate(self, dim: int) -> nn.Module | None:
        """What F is multiplied by on its way to V'; None where nothing goes there."""
        if self.lang_path == "off":
            return None
        return OpenGate() if self.gate == "off" else LanguageGate(dim, GATES[self.gate]())


PUBLISHED = Variant()


class OpenGate(nn.Module):
    """No gate: a weight of one for all features."""

    def forward(self, fused: Tensor) -> Tensor:
        """(..., C) -> scalar 1."""
        return fused.new_ones(())


class SentenceFusion(nn.Module):
    """Plain fusion: GELU(Conv(join(pixel, sentence))), the sentence one vector for all pixels.

    Args:
        vis_dim: channels C of the stage.
        lang_dim: channels of the words.
        join: a key of :data:`JOINS`.
        dropout: dropout after each projection, as in PWAM.
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
        """Fuse; arguments and result as in :meth:`lib.fusion.PWAM.forward`."""
        present = lang_mask[..., None].to(lang.dtype)
        count = present.sum(1, keepdim=True).clamp(min=1)  # a sentence without words is zeros
        mean = (lang * present).sum(1, keepdim=True) / count  # (B, 1, C_l)
        return self.project_mm(self.join(self.vis_project(vis), self.lang_project(mean)))


def trained_with(recorded: Any, asked: Mapping[str, str]) -> dict[str, str]:
    """What a checkpoint's ``args`` say of the options ``asked``.

    Args:
        recorded: ``args`` of the checkpoint: a dictionary, or an object with attributes. Files of
            the release, and of a train.py before these options, lack them: they are of the
            published network.
        asked: of :attr:`lib.model.Segmenter.variant`.
    """
    held = recorded if isinstance(recorded, Mapping) else getattr(recorded, "__dict__", {})
    published = asdict(PUBLISHED) | {"mha": ONE_HEAD}
    # A stranger's file may hold anything under these names.
    texts = {name: value for name, value in held.items() if isinstance(value, str)}
    return {name: texts.get(name) or published[name] for name in asked} if held else {}


def variant_of_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What names and shapes of weights tell of the variant, as options and their values."""

    def holds(part: str) -> bool:
        return any(part in name for name in state)

    joint = [v for k, v in state.items() if k.endswith(".fusion.project_mm.0.weight")]
    plain = "concat" if joint and joint[0].shape[1] > joint[0].shape[0] else "add or mul"
    affine = "batch" if holds(".f_query.1.norm.running_mean") else "layer"
    blind = holds(".fusion.") and not holds(".res_gate.")
    only_words = holds(".image_lang_att.") and not holds(".fusion.vis_project.")
    return {
        "fusion": plain if holds(".fusion.lang_project.") else "pwam",
        "pwam_norm": affine if holds(".f_query.1.norm.") else "instance or none",
        "pwam_combine": "words" if only_words else "mul or add",
        "lang_path": "off (or --gate off)" if blind else "on",
    }
