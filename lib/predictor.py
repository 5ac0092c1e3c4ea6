"""From an image and expressions to masks, with a trained model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from bert import encode
from bert.tokenizer import Tokenizer
from data.loaders import Batch, prepare_batch
from data.transforms import as_tensor, resize_image
from lib.attention import attention_figure, word_attention
from lib.evaluation.evaluator import Prediction, resize_prediction
from lib.model import Segmenter
from lib.runtime import autocast
from lib.visualize import overlay, printable
from refer.images import MAX_PIXELS, open_rgb


class Predictor:
    """Predicts masks of an image's original size.

    The model's input is the image resized to a square, as in training. Its logits are resized
    back (bilinear), and the mask is their argmax there.

    Args:
        model: in eval mode, on any device.
        tokenizer: of its text encoder.
        img_size: side S of the square, pixels.
        max_tokens: N_l; a longer expression is cut.
        batch_size: upper limit of expressions in one forward pass.
        amp: see :func:`lib.runtime.autocast`.
    """

    def __init__(
        self,
        model: Segmenter,
        tokenizer: Tokenizer,
        img_size: int = 480,
        max_tokens: int = 20,
        batch_size: int = 8,
        amp: str = "off",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.img_size, self.max_tokens = img_size, max_tokens
        self.batch_size, self.amp = batch_size, amp
        self.device = next(model.parameters()).device

    def predict(self, image: Image.Image, expressions: Sequence[str]) -> list[Prediction]:
        """The mask and probabilities of each expression, at the size of the RGB ``image``."""
        logits = self.logits(image, expressions)
        return [resize_prediction(each, image.height, image.width) for each in logits]

    @torch.inference_mode()
    def logits(self, image: Image.Image, expressions: Sequence[str]) -> Tensor:
        """(N, 2, S, S) float32 logits of N expressions, on the model's device."""
        batch = self._batch(image, expressions)
        pixels = batch["image"]
        logits = []
        for ids, attention_mask in zip(
            batch["input_ids"].split(self.batch_size),
            batch["attention_mask"].split(self.batch_size),
            strict=True,
        ):
            with autocast(self.device, self.amp):
                out = self.model(pixels.expand(len(ids), -1, -1, -1), ids, attention_mask)
            logits.append(out.float())
        return torch.cat(logits)

    @torch.inference_mode()
    def draw_attention(
        self, image: Image.Image, expression: str, prediction: Prediction
    ) -> Image.Image:
        """The figure of each pixel's attention to each word, at every stage.

        Raises:
            InputError: the model has no attention to words.
        """
        batch = self._batch(image, [expression])
        maps = word_attention(self.model, **batch)
        real = int(batch["attention_mask"].sum())
        return attention_figure(
            image,
            overlay(image, prediction.mask),
            self.tokenizer.convert_ids_to_tokens(batch["input_ids"][0, :real].tolist()),
            [m[0, :real].float().cpu().numpy() for m in maps],
            printable(expression),
        )

    def is_cut(self, expression: str) -> bool:
        """Whether an expression has more than ``max_tokens`` tokens."""
        attention_mask = encode(self.tokenizer, [expression], self.max_tokens + 1)[1]
        return int(attention_mask.sum()) > self.max_tokens

    def _batch(self, image: Image.Image, expressions: Sequence[str]) -> Batch:
        ids, attention_mask = encode(self.tokenizer, expressions, self.max_tokens)
        pixels = as_tensor(resize_image(image, self.img_size))[None]
        batch = {"image": pixels, "input_ids": ids, "attention_mask": attention_mask}
        return prepare_batch(batch, self.device)


def open_upright(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image as RGB, turned as its EXIF orientation says.

    Raises:
        InputError: missing, not an image, damaged or too large.
    """
    image = open_rgb(path, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata
            return ImageOps.exif_transpose(image)
    except Exception:  # PIL raises many kinds for damaged metadata; the pixels are fine
        return image
