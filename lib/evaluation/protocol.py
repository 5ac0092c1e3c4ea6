"""The evaluation protocol, and how it differs from the standard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EVAL_MODES = ("each", "cat", "mean")
EVAL_SIZES = ("model", "original")
TEXTS = ("raw", "sent")
MASK_MODES = ("release", "union")
VAL_EXPRESSIONS = ("one", "all")

STANDARD = "standard"
TRAINED = ("trained_img_size", "trained_max_tokens")
NO_TARGET_PIXELS = 50  # fewer are no target, in papers on gRefCOCO
# Parts of a label that are always told, but are no deviation.
USUAL = {f"no_target_pixels={NO_TARGET_PIXELS}", "no_target_pixels=head"}


@dataclass(frozen=True)
class Protocol:
    """The choices that change a number; the defaults are those of the published tables.

    Attributes:
        eval_mode: a sample is each expression alone, or an object, whose expressions are joined
            (cat) or whose predicted probabilities are averaged (mean).
        eval_size: where pixels are counted: at img_size x img_size (model), or at the image's
            original size, to which the logits are resized (original).
        text: the expression as written (raw), or lower-cased and cleaned (sent).
        mask_mode: pixels in two polygons of an object are background (release) or object (union).
        val_expressions: all of an object, or one drawn at random.
        img_size: side of the model's square input, pixels.
        max_tokens: N_l; longer expressions are cut.
        model_tokens: the N_l that the model is published with.
        dataset_masks: the mask_mode that the dataset is published with.
        trained_img_size, trained_max_tokens: those that the checkpoint was trained with; None if
            that is not known. A number at others is not that of the trained model.
        no_target_pixels: a predicted mask of fewer pixels, or of none, means that there is no
            target; 'head': the model's no-target head decides. None for datasets where every
            expression has a target, or where the metrics define it.
    """

    eval_mode: str = "each"
    eval_size: str = "model"
    text: str = "raw"
    mask_mode: str = "release"
    val_expressions: str = "all"
    img_size: int = 480
    max_tokens: int = 20
    model_tokens: int = 20
    dataset_masks: str = "release"
    trained_img_size: int | None = None
    trained_max_tokens: int | None = None
    no_target_pixels: int | str | None = None

    def choices(self) -> dict[str, Any]:
        """Every choice, by its flag's name."""
        facts = ("model_tokens", "dataset_masks", *TRAINED)
        names = [name for name in self.__dataclass_fields__ if name not in facts]
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def differences(self) -> dict[str, Any]:
        """The choices that are not the standard's."""
        standard = Protocol(max_tokens=self.model_tokens, mask_mode=self.dataset_masks).choices()
        choices = self.choices()
        found = {name: value for name, value in choices.items() if value != standard.get(name)}
        for name in TRAINED:
            trained = getattr(self, name)
            if trained not in (None, choices[name.removeprefix("trained_")]):
                found[name] = trained
        return found

    @property
    def is_standard(self) -> bool:
        """Whether the numbers can be compared with published ones."""
        return not warning(self.label)

    @property
    def label(self) -> str:
        """'standard', or what differs: 'eval_mode=cat eval_size=original'."""
        return " ".join(f"{k}={v}" for k, v in self.differences().items()) or STANDARD

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the label and the choices."""
        return {"label": self.label, "standard": self.is_standard, **self.choices()}


def at_original_size(label: str) -> str:
    """The label with pixels counted at the image's original size instead."""
    choices = {} if label == STANDARD else dict(part.split("=", 1) for part in label.split(" "))
    choices["eval_size"] = "original"
    order = [name for name in Protocol.__dataclass_fields__ if name in choices]
    return " ".join(f"{name}={choices[name]}" for name in order)


def tag(label: str) -> str:
    """What follows the name of a number: '' for the standard, else ' [label]'."""
    return "" if label == STANDARD else f" [{label}]"


def warning(label: str) -> str:
    """A line to print with numbers: '' for the standard protocol."""
    usual = USUAL.issuperset(label.split(" ")) or label == STANDARD
    return "" if usual else f"NOT the standard protocol: {label}"
