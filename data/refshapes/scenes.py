"""Scenes of RefShapes: what lies where, drawn, and the ground truth of what can be seen."""

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data.refshapes.drawing import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Pixels,
    Points,
    background,
    raster,
    skin,
    turned,
    visible_polygons,
)

T = TypeVar("T")

_COARSE = 96  # long side, in cells, of the grid on which places are tried
_ZOOM = 3  # subpixels along each axis of a pixel


@dataclass(frozen=True)
class Level:
    """How hard scenes are.

    Attributes:
        number: part of the random seed.
        count: fewest and most objects.
        area: smallest and largest object as a fraction of the image.
        side: shortest and longest long side of the image in pixels.
        shapes: names in `SHAPES`.
        colours: names in `COLOURS`.
        textured: share of objects with a texture.
        twins: chances that a new object shares shape, colour, both or nothing with another.
        crowd: share of objects put where they overlap another.
        visible: smallest visible share of any object.
        touch: largest overlap, as a share of the smaller object, unless crowded.
        gap: distance, as a fraction of the image's side, that "left of" and its like need.
        rough: strength of the background's mottling and grain.
        clutter: up to so many stray strokes in the background.
    """

    number: int
    count: tuple[int, int]
    area: tuple[float, float]
    side: tuple[int, int]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    textured: float
    twins: tuple[float, float, float, float]
    crowd: float
    visible: float
    touch: float
    gap: float
    rough: float
    clutter: int


_EASY_SHAPES = ("circle", "heart", "square", "triangle", "star")
_MEDIUM_SHAPES = (*_EASY_SHAPES, "cross", "moon", "diamond", "pair of dots")

LEVELS: dict[str, Level] = {
    "easy": Level(
        number=0,
        count=(2, 3),
        area=(0.08, 0.25),
        side=(160, 320),
        shapes=_EASY_SHAPES,
        colours=("red", "green", "blue", "yellow", "purple", "black"),
        textured=0.0,
        twins=(0.33, 0.33, 0.14, 0.2),
        crowd=0.0,
        visible=0.9,
        touch=0.04,
        gap=0.16,
        rough=0.15,
        clutter=0,
    ),
    "medium": Level(
        number=1,
        count=(3, 5),
        area=(0.04, 0.16),
        side=(240, 448),
        shapes=_MEDIUM_SHAPES,
        colours=tuple(COLOURS),
        textured=0.4,
        twins=(0.35, 0.25, 0.25, 0.15),
        crowd=0.2,
        visible=0.6,
        touch=0.02,
        gap=0.12,
        rough=0.5,
        clutter=4,
    ),
    "hard": Level(
        number=2,
        count=(4, 8),
        area=(0.02, 0.12),
        side=(320, 640),
        shapes=tuple(SHAPES),
        colours=tuple(COLOURS),
        textured=0.55,
        twins=(0.3, 0.25, 0.25, 0.2),
        crowd=0.35,
        visible=0.45,
        touch=0.02,
        gap=0.09,
        rough=1.0,
        clutter=14,
    ),
}


@dataclass(frozen=True)
class Style:
    """What an object looks like, apart from its size."""

    shape: str
    colour: str
    texture: str


@dataclass(frozen=True)
class Placed:
    """An object on the canvas, before drawing; outlines and holes in pixels."""

    style: Style
    area: float
    outlines: list[Points]
    holes: list[Points]

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in pixels."""
        corners = np.concatenate(self.outlines)
        (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
        return float(x0), float(y0), float(x1), float(y1)


@dataclass(frozen=True)
class Thing:
    """An object as it can be seen.

    Attributes:
        style: shape, colour and texture.
        centre: x and y of the mean visible pixel.
        area: visible pixels.
        whole: pixels if nothing lay over it.
        extent: square root of the area of the whole object's box, in pixels.
        box: x, y, width, height of the visible part.
        hidden_by: index of an object above → share of `whole` that it hides.
        polygons: outlines of the visible part, flat x, y lists that do not overlap.
    """

    style: Style
    centre: tuple[float, float]
    area: int
    whole: int
    extent: float
    box: tuple[int, int, int, int]
    hidden_by: dict[int, float] = field(default_factory=dict)
    polygons: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Scene:
    """An image's ground truth; things are ordered from the bottom to the top."""

    width: int
    height: int
    gap: float
    things: tuple[Thing, ...]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_weighted(rng: np.random.Generator, options: Sequence[T], weights: Iterable[float]) -> T:
    """One of the options, by weights of any sum (`rng.choice` takes ten times as long)."""
    steps = list(accumulate(weights))
    return options[bisect(steps, float(rng.random()) * steps[-1], hi=len(steps) - 1)]


class Drawn(NamedTuple):
    """A scene, its image (H, W, 3) uint8, and the index of each pixel's object (H, W), or -1."""

    scene: Scene
    pixels: NDArray[np.uint8]
    owner: NDArray[np.int16]


def sample_scene(rng: np.random.Generator, level: Level, lead: Sequence[str]) -> Drawn:
    """Draw a random scene.

    Args:
        rng: draws everything.
        level: how hard.
        lead: shapes of which the scene shall hold one at least.
    """
    while True:
        styles = _styles(rng, level, lead)
        # A set of objects keeps its chance when it is hard to place, or crowds would get rare.
        for _ in range(20):
            size = _canvas(rng, level)
            placed = _place_all(rng, level, size, styles)
            if placed is None:
                continue
            drawn = _draw(rng, level, size, placed)
            if all(thing.area >= level.visible * thing.whole for thing in drawn.scene.things):
                return drawn


def _canvas(rng: np.random.Generator, level: Level) -> tuple[int, int]:
    """Width and height of an image, of formats from 2:3 to 3:2."""
    longer = int(rng.integers(level.side[0], level.side[1] + 1))
    shorter = round(longer / float(np.exp(rng.uniform(0, np.log(1.5)))))
    return (longer, shorter) if rng.random() < 0.6 else (shorter, longer)


def _styles(rng: np.random.Generator, level: Level, lead: Sequence[str]) -> list[Style]:
    """Looks of a scene's objects, each of which shares something with another most of the time."""

    def fresh(shapes: Sequence[str]) -> Style:
        texture = pick(rng, TEXTURES[1:])
        return Style(
            shape=pick(rng, shapes),
            colour=pick(rng, level.colours),
            texture=texture if rng.random() < level.textured else "plain",
        )

    styles = [fresh(lead)]
    count = int(rng.integers(level.count[0], level.count[1] + 1))
    while len(styles) < count:
        other, new = pick(rng, styles), fresh(level.shapes)
        shared = pick_weighted(rng, range(4), level.twins)
        shape = other.shape if shared in (0, 2) else new.shape
        colour = other.colour if shared in (1, 2) else new.colour
        if not _confusing(shape, colour, styles):
            styles.append(Style(shape, colour, new.texture))
    return [styles[i] for i in rng.permutation(len(styles))]


def _confusing(shape: str, colour: str, styles: Sequence[Style]) -> bool:
    """Whether people could not tell what belongs together, or what a name means.

    Four dots of one colour can be paired in several ways, and each of two dots is a circle too.
    """
    if len(SHAPES[shape].outlines) > 1 and (shape, colour) in ((s.shape, s.colour) for s in styles):
        return True
    return {shape, *(style.shape for style in styles)} >= {"circle", "pair of dots"}


def _place_all(
    rng: np.random.Generator, level: Level, size: tuple[int, int], styles: Sequence[Style]
) -> list[Placed] | None:
    """Find a place for every object, or give up."""
    scale = _COARSE / max(size)
    grid = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    placed: list[Placed] = []
    wholes: list[Pixels] = []
    for style in styles:
        # Interleaved pairs are a puzzle nobody would refer to.
        single = len(SHAPES[style.shape].outlines) == 1
        crowded = bool(placed) and single and rng.random() < level.crowd
        for _ in range(25):
            item = _put(rng, level, size, style, placed if crowded else [])
            if item is None:
                continue
            cells = _coarse(item, scale, grid)
            if _fits(cells, wholes, level, crowded):
                placed.append(item)
                wholes.append(cells)
                break
        else:
            return None
    return placed


def _put(
    rng: np.random.Generator,
    level: Level,
    size: tuple[int, int],
    style: Style,
    near: Sequence[Placed],
) -> Placed | None:
    """Try one size and place: anywhere inside the image, or upon one of the objects `near`."""
    shape = SHAPES[style.shape]
    share = np.exp(rng.uniform(*np.log(level.area)))
    area = float(share) * size[0] * size[1]
    turn = float(rng.uniform(-shape.turn, shape.turn))
    outlines = turned(shape.outlines, turn, area**0.5)
    corners = np.concatenate(outlines)
    low, high = corners.min(0), corners.max(0)
    first, last = 2 - low, np.array(size) - 2 - high
    if np.any(last < first) or np.any(high - low > 0.75 * np.array(size)):
        return None
    at = rng.uniform(first, last)
    if near:
        x0, y0, x1, y1 = pick(rng, near).box()
        reach = rng.uniform(-0.5, 0.5, 2) * ((x1 - x0, y1 - y0) + (high - low))
        at = np.clip((x0 + x1, y0 + y1) / np.array(2.0) + reach, first, last)
    holes = turned(shape.holes, turn, area**0.5)
    return Placed(style, area, [part + at for part in outlines], [part + at for part in holes])


def _coarse(item: Placed, scale: float, grid: tuple[int, int]) -> Pixels:
    canvas = Image.new("1", grid)
    pen = ImageDraw.Draw(canvas)
    for part in item.outlines:
        pen.polygon((part * scale - 0.5).ravel().tolist(), fill=1)
    return np.asarray(canvas)


def _fits(cells: Pixels, wholes: Sequence[Pixels], level: Level, crowded: bool) -> bool:
    """Whether a new top object leaves those below enough, and overlaps as much as it should."""
    area, most = int(np.count_nonzero(cells)), 0.0
    for whole in wholes:
        common = int(np.count_nonzero(cells & whole))
        below = int(np.count_nonzero(whole))
        if common > (1 - level.visible) * below:
            return False
        most = max(most, common / max(1, min(area, below)))
    return most >= 0.08 if crowded else most <= level.touch


def _draw(
    rng: np.random.Generator, level: Level, size: tuple[int, int], placed: Sequence[Placed]
) -> Drawn:
    canvas = background(rng, size, level.rough, level.clutter)
    owner = np.full((size[1], size[0]), -1, np.int16)
    wholes: list[tuple[tuple[slice, slice], Pixels]] = []
    for index, item in enumerate(placed):
        x0, y0, x1, y1 = item.box()
        left, upper = max(0, int(x0) - 1), max(0, int(y0) - 1)
        right, lower = min(size[0], int(x1) + 2), min(size[1], int(y1) + 2)
        window = (slice(upper, lower), slice(left, right))
        shift = np.array([left, upper])
        cover, rim = raster(
            [part - shift for part in item.outlines],
            [part - shift for part in item.holes],
            (right - left, lower - upper),
            _ZOOM,
            rim=0.6 + size[0] / 400,
        )
        style = item.style
        paint = skin(rng, style.colour, style.texture, cover.shape, item.area**0.5)
        paint = paint * (1 - 0.3 * rim[..., None])
        canvas[window] += cover[..., None] * (paint - canvas[window])
        wholes.append((window, cover >= 0.5))
        owner[window][cover >= 0.5] = index
    things = tuple(_look(i, item, wholes[i], owner) for i, item in enumerate(placed))
    pixels = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return Drawn(Scene(size[0], size[1], level.gap, things), pixels, owner)


def _look(
    index: int,
    item: Placed,
    drawn: tuple[tuple[slice, slice], Pixels],
    owner: NDArray[np.int16],
) -> Thing:
    """Measure what is visible of an object."""
    (rows, cols), whole = drawn
    inside = owner[rows, cols]
    seen = inside == index
    ys, xs = np.nonzero(seen)
    full = int(np.count_nonzero(whole))
    if not len(xs):
        return Thing(item.style, (0.0, 0.0), 0, full, 0.0, (0, 0, 0, 0))
    above, counts = np.unique(inside[whole & ~seen], return_counts=True)
    x0, y0 = int(xs.min()) + cols.start, int(ys.min()) + rows.start
    left, upper, right, lower = item.box()
    hidden = {int(a): round(int(n) / full, 4) for a, n in zip(above, counts, strict=True)}
    return Thing(
        style=item.style,
        centre=(round(xs.mean() + cols.start + 0.5, 2), round(ys.mean() + rows.start + 0.5, 2)),
        area=len(xs),
        whole=full,
        extent=round(((right - left) * (lower - upper)) ** 0.5, 2),
        box=(x0, y0, int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1),
        hidden_by=hidden,
        polygons=_polygons(item, seen, (cols.start, rows.start), bool(hidden)),
    )


def _polygons(
    item: Placed, seen: Pixels, corner: tuple[int, int], hidden: bool
) -> list[list[float]]:
    """The shape's own outlines where they are all visible, else outlines of the visible pixels."""
    if not hidden and not item.holes:
        return [np.round(part, 2).ravel().tolist() for part in item.outlines]
    shift = np.array(corner)
    traced = visible_polygons(seen)
    return [(np.reshape(p, (-1, 2)) + shift).ravel().tolist() for p in traced]
