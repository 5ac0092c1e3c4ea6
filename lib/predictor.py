"""From images and expressions to masks, with a trained model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bert import encode
from bert.tokenizer import Tokenizer
from data.loaders import Batch, prepare_batch
from data.transforms import as_tensor, resize_image
from lib.attention import attention_figure, join_pieces, word_attention
from lib.checkpoint.rebuild import open_trained
from lib.errors import InputError
from lib.evaluation.evaluator import Prediction, expression_logits, resize_prediction
from lib.model import Segmenter
from lib.runtime import AMP, resolve_device
from lib.visualize import overlay, printable
from refer.images import MAX_PIXELS, open_rgb, to_rgb

# A path, PIL's image, (H, W, 3) uint8 array, or (3, H, W) tensor of bytes or of floats in [0, 1].
ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor


class Attention(NamedTuple):
    """Attention of each pixel to the words of an expression (LAVT, Eq. 1-2).

    Attributes:
        words: N words, with [CLS] and [SEP]; the pieces of a word are added up.
        maps: (N, H_i, W_i) float32 of the four stages, strides 4 to 32 of the model's square
            input; a pixel's weights sum to 1 over the words.
    """

    words: list[str]
    maps: list[npt.NDArray[np.float32]]


class Predictor:
    """Predicts masks of an image's original size.

    The model's input is the image resized to a square, as in training. Its logits are resized
    back (bilinear), and the mask is their argmax there.

    Args:
        model: in eval mode, on any device.
        tokenizer: of its text encoder.
        img_size: side S of the square, pixels.
        max_tokens: N_l; a longer expression is cut.
        batch_size: upper limit of expressions in one forward pass. On a CPU each takes one of its
            own, as in test.py, so that its mask does not depend on the others.
        amp: see :func:`lib.runtime.autocast`.
        max_pixels: upper limit of an image's pixels.

    Attributes:
        settings: of the checkpoint, see :class:`lib.checkpoint.Trained`; {} if built otherwise.
    """

    def __init__(
        self,
        model: Segmenter,
        tokenizer: Tokenizer,
        img_size: int = 480,
        max_tokens: int = 20,
        batch_size: int = 8,
        amp: str = "off",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if amp not in AMP:
            raise InputError(f"amp '{amp}': choose one of {', '.join(AMP)}")
        self.model, self.tokenizer = model, tokenizer
        self.img_size, self.max_tokens = img_size, max_tokens
        self.batch_size, self.amp, self.max_pixels = batch_size, amp, max_pixels
        self.device = next(model.parameters()).device
        self.settings: dict[str, Any] = {}

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        amp: str = "off",
        *,
        bert: str | None = None,
        ck_bert: str | None = None,
        img_size: int | None = None,
        max_tokens: int | None = None,
        accelerate: bool = True,
        **options: Any,
    ) -> Predictor:
        """The model of a checkpoint, ours or published, without any of its flags.

        Args:
            path: of the checkpoint; or a folder, see :meth:`from_pretrained`.
            device: 'cpu', 'cuda', 'cuda:1', 'mps'; None for the first GPU there is, else the CPU.
            amp: mixed precision, one of 'off', 'bf16', 'fp16', 'auto'.
            bert: folder or hub name of the text encoder's vocabulary and configuration, for files
                that have none: those of the releases, and ours of earlier versions
                (bert-base-uncased).
            ck_bert: of the configuration alone, if it is elsewhere.
            img_size, max_tokens: others than the model was trained with.
            accelerate: use :mod:`lib.cpu` where this machine's CPU gains from it.
            options: further keywords of the class.

        Raises:
            InputError: it cannot be read, is not of a model, or the device cannot be used.
        """
        chosen = resolve_device(device)
        sources = {"bert_tokenizer": bert, "ck_bert": ck_bert}
        given: dict[str, Any] = {name: source for name, source in sources.items() if source}
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        trained = open_trained(path, given, accelerate=accelerate)
        settings = trained.settings
        predictor = cls(
            trained.model.to(chosen),
            trained.tokenizer,
            settings["img_size"] if img_size is None else img_size,
            settings["max_tokens"] if max_tokens is None else max_tokens,
            amp=amp,
            **options,
        )
        predictor.settings = settings
        return predictor

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        revision: str | None = None,
        device: str | torch.device | None = None,
        amp: str = "off",
        *,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Predictor:
        """The model of a folder that ``tools.export --format pretrained`` wrote, or of the hub.

        Args:
            source: the folder, or the name of a model on the Hugging Face hub, ``owner/name``.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            device, amp, options: of :meth:`from_checkpoint`.

        Raises:
            InputError: as :meth:`from_checkpoint`, or the hub cannot be reached.
        """
        from lib.checkpoint.pretrained import locate

        folder = locate(source, revision, token, cache_dir, local_files_only)
        return cls.from_checkpoint(folder, device, amp, **options)

    def predict(self, image: ImageLike, expressions: str | Sequence[str]) -> list[Prediction]:
        """The mask and probabilities of each expression, at the image's size.

        Args:
            image: a path (turned as its EXIF orientation says), a PIL image (as it is), an array
                (H, W, 3) uint8 or a tensor (3, H, W), uint8 or float in [0, 1]; RGB.
            expressions: one or several.

        Raises:
            InputError: the image cannot be read or is none of these, or an expression is no text.
        """
        return self.predict_batch([(image, expressions)])[0]

    def predict_batch(
        self, pairs: Iterable[tuple[ImageLike, str | Sequence[str]]]
    ) -> list[list[Prediction]]:
        """:meth:`predict` for several images of any sizes.

        Args:
            pairs: an image and its expressions each.

        Returns:
            The predictions of each pair.
        """
        requests = [(self.open(image), _as_list(expressions)) for image, expressions in pairs]
        flat = [(i, text) for i, (_, texts) in enumerate(requests) for text in texts]
        results: list[list[Prediction]] = [[] for _ in requests]
        for start in range(0, len(flat), self.batch_size):
            part = flat[start : start + self.batch_size]
            images = [requests[i][0] for i, _ in part]
            logits = self._logits(images, [text for _, text in part])
            for (i, text), image, each in zip(part, images, logits, strict=True):
                results[i].append(resize_prediction(each, image.height, image.width, text))
        return results

    def logits(self, image: ImageLike, expressions: str | Sequence[str]) -> Tensor:
        """(N, 2, S, S) float32 logits of N expressions, on the model's device."""
        opened, texts = self.open(image), _as_list(expressions)
        parts = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        return torch.cat([self._logits([opened] * len(part), part) for part in parts])

    @torch.inference_mode()
    def attention(self, image: ImageLike, expression: str) -> Attention:
        """Attention of each pixel to each word, at every stage.

        Raises:
            InputError: the model has no attention to words.
        """
        batch = self._batch([self.open(image)], [expression])
        maps = word_attention(self.model, **batch)
        real = int(batch["attention_mask"].sum())
        pieces = self.tokenizer.convert_ids_to_tokens(batch["input_ids"][0, :real].tolist())
        return Attention(*join_pieces(pieces, [m[0].float().cpu().numpy() for m in maps]))

    def draw_attention(
        self, image: ImageLike, expression: str, prediction: Prediction
    ) -> Image.Image:
        """The figure of :meth:`attention`, beside the image with the prediction's mask."""
        opened = self.open(image)
        words, maps = self.attention(opened, expression)
        shown = overlay(opened, prediction.mask)
        return attention_figure(opened, shown, words, maps, printable(expression))

    def is_cut(self, expression: str) -> bool:
        """Whether an expression has more than ``max_tokens`` tokens."""
        attention_mask = encode(self.tokenizer, [expression], self.max_tokens + 1)[1]
        return int(attention_mask.sum()) > self.max_tokens

    def open(self, image: ImageLike) -> Image.Image:
        """The image as PIL's RGB image; see :meth:`predict`."""
        return as_rgb(image, self.max_pixels)

    @torch.inference_mode()
    def _logits(self, images: Sequence[Image.Image], expressions: Sequence[str]) -> Tensor:
        batch = self._batch(images, expressions)
        return torch.cat(expression_logits(self.model, batch, self.amp)).float()

    def _batch(self, images: Sequence[Image.Image], expressions: Sequence[str]) -> Batch:
        ids, attention_mask = encode(self.tokenizer, expressions, self.max_tokens)
        resized = {id(image): as_tensor(resize_image(image, self.img_size)) for image in images}
        pixels = torch.stack([resized[id(image)] for image in images])
        batch = {"image": pixels, "input_ids": ids, "attention_mask": attention_mask}
        return prepare_batch(batch, self.device)


def _as_list(expressions: str | Sequence[str]) -> list[str]:
    texts = [expressions] if isinstance(expressions, str) else list(expressions)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"expression {text!r:.60} is of type {type(text).__name__}, not str")
    return texts


def as_rgb(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as PIL's RGB image.

    Args:
        image: see :meth:`Predictor.predict`.
        max_pixels: upper limit of a file's pixels.

    Raises:
        InputError: it cannot be read, or is of another type or shape.
    """
    if isinstance(image, str | os.PathLike):
        return open_upright(Path(image), max_pixels)
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except Exception as e:  # PIL's decoders raise nearly anything for damaged files
            raise InputError(f"the image cannot be read: {str(e)[:120]}") from None
    shape = tuple(getattr(image, "shape", ()))
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and 0 not in shape:
            return Image.fromarray(np.ascontiguousarray(image))
        raise InputError(f"an image array is (H, W, 3) uint8 in RGB, not {shape} {image.dtype}")
    if isinstance(image, Tensor):
        if len(shape) != 3 or shape[0] != 3 or 0 in shape:
            raise InputError(f"an image tensor is (3, H, W) in RGB, not {shape}")
        pixels = image.detach().cpu()
        if pixels.is_floating_point():
            if not bool(((pixels >= 0) & (pixels <= 1)).all()):
                raise InputError(
                    "an image tensor of floats is in [0, 1]: give it before it is normalised"
                )
            pixels = (pixels.float() * 255).round().to(torch.uint8)
        if pixels.dtype == torch.uint8:
            return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        raise InputError(f"an image tensor is of uint8, or of floats in [0, 1], not {image.dtype}")
    raise InputError(
        f"an image is a path, a PIL image, an array or a tensor, not {type(image).__name__}"
    )


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
