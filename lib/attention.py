"""Attention of each pixel to each word, in the fusion modules, and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lib.crossvlt import CrossVLT, WordFusion
from lib.errors import InputError
from lib.fusion import PWAM
from lib.lavt import LAVT
from lib.model import Segmenter
from lib.visualize import FAINT, INK, PAPER, Color, font, wrap

Map = npt.NDArray[np.float32]

# From weight 0 to the figure's largest; brightness grows with the weight.
SCALE: tuple[Color, ...] = (
    (12, 8, 46),
    (74, 18, 108),
    (148, 38, 104),
    (216, 72, 68),
    (247, 140, 32),
    (252, 212, 88),
    (255, 252, 214),
)
OPACITY = 0.72  # of the colours over the grey image
GREYS = (80, 180)  # range of the grey image, so that dark objects do not look like weights
MAX_WIDTH = 5600  # of a figure, pixels
MIN_SIDE = 120  # of an image in it, so that labels are legible


def fusions(model: Segmenter) -> list[nn.Module]:
    """The fusion modules of the four stages.

    Raises:
        InputError: the model has none.
    """
    stages: list[Any] = []
    if isinstance(model, LAVT):
        stages = [stage.fusion for stage in cast("list[Any]", list(model.backbone.layers))]
    elif isinstance(model, CrossVLT):
        stages = [stage.layers.attn1 for stage in cast("list[Any]", list(model.backbone))]
    if not stages or not all(isinstance(stage, PWAM | WordFusion) for stage in stages):
        how = getattr(model, "variant", {}).get("fusion", type(model).__name__)
        raise InputError(f"this model has no attention to words to show (fusion '{how}')")
    return stages


@torch.no_grad()
def word_attention(
    model: Segmenter, image: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> list[Tensor]:
    """Attention of each pixel over the words, at every stage (LAVT, Eq. 1-2).

    The weights are computed from the inputs of the fusion modules; the forward pass itself is the
    usual one.

    Args:
        model: LAVT with PWAM, or CrossVLT (its first fusion of each stage).
        image: (B, 3, H, W), normalised.
        input_ids: (B, N_l).
        attention_mask: (B, N_l), 1 = real token.

    Returns:
        Four maps (B, N_l, H_i, W_i), strides 4 to 32: the mean over heads. A pixel's weights sum
        to 1 over the words (except with ``--pwam_attention sigmoid``); those of padding are 0.

    Raises:
        InputError: see :func:`fusions`.
    """
    modules, inputs = fusions(model), dict[int, tuple[Tensor, ...]]()

    def keep(stage: int, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[stage] = given

    hooks = [m.register_forward_pre_hook(partial(keep, i)) for i, m in enumerate(modules)]
    try:
        model(image, input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    height, width = (-(-side // 4) for side in image.shape[-2:])
    maps = []
    for i, module in enumerate(modules):
        attend = module.image_lang_att if isinstance(module, PWAM) else module
        weights = attend.attention(*inputs[i]).mean(1)  # type: ignore[operator]
        maps.append(weights.transpose(1, 2).unflatten(-1, (height, width)))
        height, width = (height + 1) // 2, (width + 1) // 2
    return maps


def whole_words(pieces: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Words and the positions of their pieces.

    Args:
        pieces: BERT's tokens, where '##' continues a word. [CLS] and [SEP] stay.
    """
    words: list[tuple[str, list[int]]] = []
    for i, piece in enumerate(pieces):
        if piece.startswith("##") and words and not words[-1][0].startswith("["):
            word, positions = words[-1]
            words[-1] = (word + piece[2:], [*positions, i])
        else:
            words.append((piece, [i]))
    return words


def join_pieces(pieces: Sequence[str], maps: Sequence[Map]) -> tuple[list[str], list[Map]]:
    """Words and their maps.

    Args:
        pieces: of :func:`whole_words`.
        maps: (pieces, H_i, W_i) of each stage; those of a word's pieces are added.
    """
    words = whole_words(pieces)
    return [w for w, _ in words], [np.stack([m[at].sum(0) for _, at in words]) for m in maps]


def attention_figure(
    image: Image.Image,
    prediction: Image.Image,
    words: Sequence[str],
    maps: Sequence[Map],
    expression: str,
) -> Image.Image:
    """One row per stage and one column per word, over the image in grey.

    Args:
        image: RGB.
        prediction: the image with the mask drawn over it.
        words: N of them.
        maps: (N, H_i, W_i) of each stage; resized bilinearly.
        expression: the figure's title.

    Returns:
        RGB. Each map has the image's size, unless the figure would be too wide.
    """
    top = max(float(m.max()) for m in maps)
    longest = max(image.size)
    room = MAX_WIDTH / (len(words) + 3)  # the left panel takes two places, labels and gaps one
    scale = min(max(longest, MIN_SIDE), max(room, MIN_SIDE)) / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    low, high = GREYS
    grey = image.convert("L").resize(size, Image.Resampling.LANCZOS)
    grey = grey.point([low + (high - low) * v // 255 for v in range(256)])
    tiles = [[_tile(grey, m / (top or 1)) for m in stage] for stage in maps]
    labels = [f"stage {i}\n{m.shape[1]} x {m.shape[2]}" for i, m in enumerate(maps, 1)]
    panel = {"image": image, "prediction": prediction}
    return _Layout(size).draw(panel, words, labels, tiles, expression, top)


def colors(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Values in [0, 1], (...) -> RGB, (..., 3)."""
    steps = np.linspace(0, 1, len(SCALE))
    channels = [np.interp(values, steps, channel) for channel in zip(*SCALE, strict=True)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _tile(grey: Image.Image, weights: Map) -> Image.Image:
    """Weights (h, w) in [0, 1] in colour over a grey image, at its size."""
    resized = Image.fromarray(weights.astype(np.float32)).resize(
        grey.size, Image.Resampling.BILINEAR
    )
    return _tint(grey, np.asarray(resized).clip(0, 1))


def _tint(grey: Image.Image, values: npt.NDArray[np.floating]) -> Image.Image:
    return Image.blend(grey.convert("RGB"), Image.fromarray(colors(values)), OPACITY)


class _Layout:
    """Places of the figure's parts, in pixels, from the size of a tile."""

    def __init__(self, tile: tuple[int, int]) -> None:
        self.text = max(11, round((tile[0] * tile[1]) ** 0.5 / 11))
        self.line = round(1.3 * self.text)
        # Small images have room for their labels around them.
        self.width, self.height = max(tile[0], 5 * self.text), max(tile[1], 2 * self.line)
        self.gap = max(4, self.text // 2)
        self.left = 2 * self.width + self.line  # the panel of image and prediction
        self.label = 5 * self.text

    def column(self, i: int) -> int:
        return self.gap + self.left + self.label + i * (self.width + self.gap)

    def row(self, i: int) -> int:
        return 2 * self.gap + 2 * self.line + self.line // 2 + i * (self.height + self.gap)

    def draw(
        self,
        panel: dict[str, Image.Image],
        words: Sequence[str],
        stages: Sequence[str],
        tiles: Sequence[Sequence[Image.Image]],
        title: str,
        top: float,
    ) -> Image.Image:
        """The figure; arguments as :func:`attention_figure` made them."""
        end = self.column(len(words))
        bottom = self.row(len(stages))
        sheet = Image.new("RGB", (end, bottom + 3 * self.line + self.gap), PAPER)
        pen = ImageDraw.Draw(sheet)
        self._text(pen, self.gap, self.gap, wrap(f"“{title}”", self.text, end - 2 * self.gap, 1)[0])
        self._panel(sheet, pen, panel, bottom - self.gap)
        for i, word in enumerate(words):
            shown = wrap(word, self.text, self.width, 1)[0]
            middle = self.column(i) + self.width // 2
            self._text(pen, middle, self.row(0) - self.gap // 2, shown, "ms")
        for i, stage in enumerate(stages):
            first, second = stage.split("\n")
            x, y = self.column(0) - self.gap, self.row(i) + self.height // 2
            self._text(pen, x, y - self.line // 2, first, "rm")
            self._text(pen, x, y + self.line // 2, second, "rm", FAINT)
            for j, tile in enumerate(tiles[i]):
                indent = (self.width - tile.width) // 2, (self.height - tile.height) // 2
                sheet.paste(tile, (self.column(j) + indent[0], self.row(i) + indent[1]))
        self._scale(sheet, pen, bottom + self.gap // 2, top, len(words))
        return sheet

    def _text(
        self, pen: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str = "la",
        ink: Color = INK,
    ) -> None:  # fmt: skip
        pen.text((x, y), text, font=font(self.text), fill=ink, anchor=anchor)

    def _panel(
        self,
        sheet: Image.Image,
        pen: ImageDraw.ImageDraw,
        panel: dict[str, Image.Image],
        bottom: int,
    ) -> None:
        """Image and prediction, one above the other, twice a tile's size if there is room."""
        start = self.row(0)
        high = (bottom - start - self.gap) // len(panel) - self.line
        for i, (name, drawing) in enumerate(panel.items()):
            scale = min(2 * self.width / drawing.width, high / drawing.height)
            size = tuple(max(1, round(n * scale)) for n in drawing.size)
            y = start + i * (size[1] + self.line + self.gap)
            shown = drawing.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            sheet.paste(shown, (self.gap, y))
            self._text(pen, self.gap, y + size[1] + self.gap // 2, name, ink=FAINT)

    def _scale(
        self, sheet: Image.Image, pen: ImageDraw.ImageDraw, y: int, top: float, words: int
    ) -> None:
        """The colour bar with its labels, and a note."""
        x, wide = self.column(0), 2 * self.width
        ramp = np.tile(np.linspace(0, 1, wide), (self.line // 2, 1))
        middle = Image.new("L", (wide, self.line // 2), sum(GREYS) // 2)
        sheet.paste(_tint(middle, ramp), (x, y))
        below = y + self.line // 2 + self.gap // 2
        self._text(pen, x, below, "0")
        self._text(pen, x + wide, below, f"{top:.2f}", "ra")
        even = 1 / words
        if top > 1.5 * even:
            at = x + round(wide * even / top)
            pen.line((at, y, at, below), fill=INK, width=max(1, self.text // 8))
            self._text(pen, at, below, f"1/{words}", "ma", FAINT)
        note = "weight of the word for the pixel, mean of the heads; 1/n: all words equal"
        room = sheet.width - x - wide - 3 * self.gap
        for i, line in enumerate(wrap(note, self.text, max(room, self.width), 3)):
            self._text(pen, x + wide + 2 * self.gap, y + i * self.line, line, ink=FAINT)
