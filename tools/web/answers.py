"""What the page shows: from an image file and lines of text to overlays, notes and files.

Functions of their arguments alone: nothing is shared between visitors. No Gradio here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

import utils
from lib.attention import colors
from lib.errors import InputError
from lib.predictor import Predictor, open_upright
from lib.visualize import overlay, printable, write_image
from refer.images import MAX_PIXELS
from refer.masks import run_lengths
from tools.demo_jobs import plan, side_files

MAX_EXPRESSIONS = 16
MAX_TEXT = 10_000  # characters of all expressions
MAX_CAPTION = 100  # characters of an expression in captions and messages
SHOWN_SIDE = 1280  # of a shown image, pixels; files have the image's own size

Levels = npt.NDArray[np.uint8]
Shown = list[tuple[Image.Image, str]]  # images and their captions


@dataclass(frozen=True)
class Result:
    """Predictions for one image.

    Attributes:
        file: the image.
        shown: the image, made smaller where it is large.
        expressions: N of them.
        scores: of the masks at threshold 0.5.
        levels: N probability maps (H, W) of the image's size, of :func:`to_levels`.
        cut: expressions of which the model reads the first tokens only.
        max_tokens: how many tokens it reads.
    """

    file: Path
    shown: Image.Image
    expressions: tuple[str, ...]
    scores: tuple[float, ...]
    levels: tuple[Levels, ...]
    cut: tuple[str, ...]
    max_tokens: int

    def masks(self, threshold: float) -> Iterator[npt.NDArray[np.bool_]]:
        """The masks (H, W) at a threshold of whole hundredths; at 0.5 the model's own."""
        return (levels > round(100 * threshold) for levels in self.levels)


def to_levels(
    mask: npt.NDArray[np.bool_], probability: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """Probabilities in hundredths, a quarter of their memory.

    Args:
        mask: the model's own, (H, W).
        probability: (H, W), in [0, 1].

    Returns:
        (H, W): a probability is above k / 100 where its level is above k. Rounding decides
        nothing at k = 50, where the mask does.
    """
    levels = np.ceil(probability.clip(0, 1).astype(np.float64) * 100).astype(np.uint8)
    return np.where(mask, np.maximum(levels, 51), np.minimum(levels, 50))


def read_expressions(text: str) -> list[str]:
    """The different expressions in a text, one a line.

    Raises:
        InputError: there is none, or there are too many.
    """
    if len(text) > MAX_TEXT:
        raise InputError(f"{len(text)} characters: at most {MAX_TEXT} are read at once")
    found = list(dict.fromkeys(filter(None, map(printable, text.splitlines()))))
    if not found:
        raise InputError("No expression: say which object to segment, like: the dog on the left.")
    if len(found) > MAX_EXPRESSIONS:
        raise InputError(f"{len(found)} expressions: at most {MAX_EXPRESSIONS} at once.")
    return found


def open_image(file: str | Path | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a visitor's image.

    Raises:
        InputError: there is none, or it cannot be read; the message has no path of the server.
    """
    if not file:
        raise InputError("No image: drop one, paste one, or choose an example.")
    try:
        return open_upright(Path(file), max_pixels)
    except InputError as e:
        message = str(e).replace(str(file), Path(file).name)
        most = f": at most {max_pixels:,} are taken here"
        raise InputError(re.sub(", more than --max_pixels.*", most, message)) from None


def predict(
    predictor: Predictor,
    file: str | Path | None,
    text: str,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Result:
    """Run the model.

    Args:
        predictor: the model.
        file: the image.
        text: expressions, one a line.
        max_pixels: upper limit of the image's.
        progress: passes the expressions on and shows how many are done.

    Raises:
        InputError: image or expressions are missing, or not usable.
    """
    image, expressions = open_image(file, max_pixels), read_expressions(text)
    scores, levels = [], []
    for expression in progress(expressions):  # one by one: a large image's maps take much memory
        (prediction,) = predictor.predict(image, [expression])
        scores.append(prediction.score)
        levels.append(to_levels(prediction.mask, prediction.probability))
    return Result(
        file=Path(str(file)),
        shown=shrink(image),
        expressions=tuple(expressions),
        scores=tuple(scores),
        levels=tuple(levels),
        cut=tuple(filter(predictor.is_cut, expressions)),
        max_tokens=predictor.max_tokens,
    )


def shrink(image: Image.Image) -> Image.Image:
    """The image, at most :data:`SHOWN_SIDE` wide and high."""
    small = image.copy()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    return small


def shorten(expression: str) -> str:
    """An expression for a caption."""
    return expression if len(expression) <= MAX_CAPTION else f"{expression[: MAX_CAPTION - 1]}…"


def draw_masks(result: Result, threshold: float) -> Shown:
    """The overlay of each expression; its caption has the score and the covered area."""
    shown = []
    for i, mask in enumerate(result.masks(threshold)):
        small = Image.fromarray(mask).resize(result.shown.size, Image.Resampling.NEAREST)
        part = math.ceil(1000 * mask.mean()) / 10  # not 0.0 % of a small object
        what = f"score {result.scores[i]:.2f} · {part:.1f} % of the image"
        caption = f"{shorten(result.expressions[i])}\n{what if mask.any() else 'nothing found'}"
        shown.append((overlay(result.shown, np.asarray(small)), caption))
    return shown


def draw_probabilities(result: Result) -> Shown:
    """The probability map of each expression, from dark (0) to bright (1)."""
    small = (Image.fromarray(levels).resize(result.shown.size) for levels in result.levels)
    maps = (Image.fromarray(colors(np.asarray(levels) / 100)) for levels in small)
    return list(zip(maps, map(shorten, result.expressions), strict=True))


def notes(result: Result, threshold: float) -> list[str]:
    """What a visitor should know: empty masks, expressions that are cut."""
    empty = [
        expression
        for expression, mask in zip(result.expressions, result.masks(threshold), strict=True)
        if not mask.any()
    ]
    return [f"Nothing found for “{shorten(e)}” at threshold {threshold:.2f}." for e in empty] + [
        f"Only the first {result.max_tokens} tokens of “{shorten(e)}” are read." for e in result.cut
    ]


def write_files(result: Result, threshold: float, folder: Path) -> list[Path]:
    """Write each mask as PNG (0 or 255) and as COCO's compressed RLE, at the image's size."""
    (job,) = plan([(result.file, list(result.expressions))], folder)
    files = []
    for path, mask in zip(job.overlays, result.masks(threshold), strict=True):
        names = side_files(path)
        write_image(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)), names["mask"])
        utils.write_json(run_lengths(mask), names["rle"])
        files += [names["mask"], names["rle"]]
    return files


def draw_attention(
    predictor: Predictor, result: Result, index: int, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The figure of an expression's attention, which runs the model again.

    Raises:
        InputError: the model has no attention to words, or the image was deleted since.
    """
    image, expression = open_image(result.file, max_pixels), result.expressions[index]
    (prediction,) = predictor.predict(image, [expression])
    try:
        return predictor.draw_attention(image, expression, prediction)
    except InputError as e:
        without = "this model has no attention to words: with"
        raise InputError(str(e).replace("--attention: with", without)) from None
