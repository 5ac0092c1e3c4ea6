"""Shapes, colours, textures and backgrounds of RefShapes, and polygons of what stays visible.

Everything is drawn with PIL polygons at several times the final resolution and averaged down.
A pixel (x, y) covers the square [x, x + 1) x [y, y + 1), as in COCO's polygons.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Points = NDArray[np.float64]  # (N, 2) corners as x, y
Pixels = NDArray[np.bool_]  # (H, W)
Floats = NDArray[np.float32]

MIN_PIECE = 8  # pixels; smaller visible crumbs get no polygon, as no annotator would draw them


@dataclass(frozen=True)
class Shape:
    """A kind of object: outlines of total area 1, with their common box centred on (0, 0).

    Attributes:
        group: "round" or "angular"; testA refers to the former, testB to the latter.
        turn: largest rotation in degrees that leaves the shape's name beyond doubt.
        outlines: one polygon per separate part.
        holes: polygons cut out of the outlines.
    """

    group: str
    turn: float
    outlines: tuple[Points, ...]
    holes: tuple[Points, ...] = ()


def _area(points: Points) -> float:
    x, y = points[:, 0], points[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _shape(
    group: str, turn: float, outlines: Sequence[Points], holes: Sequence[Points] = ()
) -> Shape:
    corners = np.concatenate(outlines)
    middle = (corners.min(0) + corners.max(0)) / 2
    scale = (sum(map(_area, outlines)) - sum(map(_area, holes))) ** -0.5
    fit = [tuple((part - middle) * scale for part in parts) for parts in (outlines, holes)]
    return Shape(group, turn, *fit)


def _polar(radii: Sequence[float], start: float = -90.0) -> Points:
    """Corners at equal angles, the first at `start` degrees (-90 is up)."""
    angles = np.radians(start + 360.0 * np.arange(len(radii)) / len(radii))
    return np.asarray(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _disc(radius: float, x: float = 0.0) -> Points:
    return _polar([radius] * 40) + np.array((x, 0.0))


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 44, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _moon() -> Points:
    """A disc of radius 1 without a disc of radius 0.85 whose centre lies 0.55 to the right."""
    meet = np.arccos((1 + 0.55**2 - 0.85**2) / (2 * 0.55))
    outer = np.linspace(meet, 2 * np.pi - meet, 30)
    tip = np.arctan2(-np.sin(meet), np.cos(meet) - 0.55) % (2 * np.pi)
    inner = np.linspace(tip, 2 * np.pi - tip, 24)[1:-1]
    curves = [np.stack([np.cos(outer), np.sin(outer)], 1)]
    curves.append(0.85 * np.stack([np.cos(inner), np.sin(inner)], 1) + np.array((0.55, 0.0)))
    return np.concatenate(curves)


def _cross(arm: float = 0.37) -> Points:
    x = [-arm, arm, arm, 1, 1, arm, arm, -arm, -arm, -1, -1, -arm]
    y = [-1, -1, -arm, -arm, arm, arm, 1, 1, arm, arm, -arm, -arm]
    return np.stack([x, y], 1).astype(float)


def _arrow() -> Points:
    half = [(-1, -0.3), (0.05, -0.3), (0.05, -0.8), (1, 0)]
    return np.array(half + [(x, -y) for x, y in half[-2::-1]], float)


SHAPES: dict[str, Shape] = {
    "circle": _shape("round", 0, [_disc(1)]),
    "heart": _shape("round", 18, [_heart()]),
    "moon": _shape("round", 35, [_moon()]),
    "ring": _shape("round", 0, [_disc(1)], [_disc(0.52)]),
    "pair of dots": _shape("round", 90, [_disc(0.5, -0.6), _disc(0.5, 0.6)]),
    "square": _shape("angular", 12, [_box(-1, -1, 1, 1)]),
    "triangle": _shape("angular", 20, [_polar([1.0] * 3)]),
    "star": _shape("angular", 36, [_polar([1.0, 0.5] * 5)]),
    "diamond": _shape("angular", 8, [_polar([1.25, 0.8] * 2)]),
    "cross": _shape("angular", 16, [_cross()]),
    "arrow": _shape("angular", 180, [_arrow()]),
    "pair of bars": _shape("angular", 90, [_box(-1, -0.7, 1, -0.2), _box(-1, 0.2, 1, 0.7)]),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 36, 40),
    "green": (42, 150, 62),
    "blue": (36, 88, 205),
    "yellow": (246, 212, 42),
    "purple": (138, 58, 176),
    "black": (28, 28, 32),
    "orange": (247, 132, 26),
    "white": (246, 246, 246),
}
_PALE = ("white", "yellow")

TEXTURES = ("plain", "striped", "dotted", "checkered")


def turned(parts: Sequence[Points], degrees: float, scale: float) -> list[Points]:
    """Rotate clockwise in the image and scale; the result's box is centred by the caller."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([(c, s), (-s, c)]) * scale
    return [part @ turn for part in parts]


def raster(
    outlines: Sequence[Points],
    holes: Sequence[Points],
    size: tuple[int, int],
    zoom: int,
    rim: float,
) -> tuple[Floats, Floats]:
    """Coverage of every pixel by a shape, and by the line along its edge.

    Args:
        outlines: parts in pixels of the result.
        holes: cut out of them.
        size: width and height of the result.
        zoom: subpixels along each axis of a pixel.
        rim: width of the edge line in pixels, 0 for none.

    Returns:
        Two (H, W) float32 arrays in [0, 1]; the edge line lies inside the shape.
    """
    big = (size[0] * zoom, size[1] * zoom)
    fill, line = Image.new("L", big), Image.new("L", big)
    fill_pen, line_pen = ImageDraw.Draw(fill), ImageDraw.Draw(line)
    for parts, ink in ((outlines, 255), (holes, 0)):
        for part in parts:
            # PIL paints the corner pixels too: half a subpixel off centres that.
            flat = (part * zoom - 0.5).ravel().tolist()
            fill_pen.polygon(flat, fill=ink)
            if rim:
                line_pen.line(flat + flat[:4], fill=255, width=max(1, round(2 * rim * zoom)))
    cover, edge = (np.array(im.reduce(zoom), np.float32) / np.float32(255) for im in (fill, line))
    return cover, np.minimum(cover, edge)


def skin(
    rng: np.random.Generator, colour: str, texture: str, shape: tuple[int, int], span: float
) -> Floats:
    """Colour every pixel of a box: the object's colour, its texture in a second tone, some light.

    Args:
        rng: draws the shade, the texture's phase and angle, and the light.
        colour: key of `COLOURS`.
        texture: one of `TEXTURES`.
        shape: height and width of the box.
        span: square root of the object's area in pixels, which sets the texture's scale.

    Returns:
        (H, W, 3) float32 in [0, 255], not clipped.
    """
    base = np.array(COLOURS[colour], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    angle, phase_u, phase_v, light = rng.uniform(0, 2 * np.pi, 4)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    shade = 1 + 0.09 * (np.cos(light) * (x / shape[1] - 0.5) + np.sin(light) * (y / shape[0] - 0.5))
    if texture == "plain":
        return base * shade[..., None].astype(np.float32)
    mix, second = (0.55, 70.0) if colour in _PALE else (0.62, 255.0)
    period = max(6.0, span * (0.26 if texture == "striped" else 0.3))
    wave = np.float32(2 * np.pi / period)
    u = np.cos(wave * (x * np.cos(angle) + y * np.sin(angle)) + phase_u)
    v = np.cos(wave * (y * np.cos(angle) - x * np.sin(angle)) + phase_v)
    field = {"striped": u, "dotted": u + v - 0.75, "checkered": 2.5 * u * v}[texture]
    amount = mix * np.clip(0.5 + field * period / 5, 0, 1)[..., None]
    return ((base * (1 - amount) + second * amount) * shade[..., None]).astype(np.float32)


def background(
    rng: np.random.Generator, size: tuple[int, int], rough: float, clutter: int
) -> Floats:
    """A muted background of middle brightness, which no object's colour is close to.

    Args:
        rng: draws everything.
        size: width and height.
        rough: strength of mottling and grain, 0 to 1.
        clutter: up to so many stray strokes in nearly the background's tone.

    Returns:
        (H, W, 3) float32 in [0, 255].
    """
    width, height = size
    grey = rng.uniform(125, 195)
    tint = rng.normal(0, 1, 3)
    base = (grey + 18 * (tint - tint.mean()) / np.abs(tint).max()).astype(np.float32)
    coarse = rng.normal(0, 1, (int(rng.integers(2, 8)), int(rng.integers(2, 8)))).astype(np.float32)
    mottle = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    pixels = base + np.float32(4 + 14 * rough) * np.clip(mottle, -2, 2)[..., None]
    if clutter:
        pixels = pixels + _strokes(rng, size, int(rng.integers(clutter // 2, clutter + 1)))
    grain = rng.integers(-128, 128, (height, width), np.int8).astype(np.float32)
    pixels += grain[..., None] * np.float32((1 + 5 * rough) / 128)
    return pixels


def _strokes(rng: np.random.Generator, size: tuple[int, int], count: int) -> Floats:
    layer = Image.new("F", size)
    pen = ImageDraw.Draw(layer)
    for _ in range(count):
        path = np.cumsum(rng.normal(0, 0.12, (4, 2)), 0) + rng.uniform(0, 1, 2)
        tone, wide = float(rng.uniform(-26, 26)), int(rng.integers(1, 5))
        pen.line((path * size).ravel().tolist(), fill=tone, width=wide, joint="curve")
    return np.asarray(layer)[..., None]


def visible_polygons(mask: Pixels) -> list[list[float]]:
    """Outline a mask by polygons that do not overlap and, together, cover just its pixels.

    Readers of REFER data drop pixels that two polygons of an object share, and a polygon has no
    hole: a piece with a hole is therefore cut in two through it.

    Args:
        mask: (H, W) bool.

    Returns:
        Flat x, y lists in COCO's manner; pieces under `MIN_PIECE` pixels are left out.
    """
    labels, count = ndimage.label(mask)
    polygons = []
    for piece, (rows, cols) in zip(range(1, count + 1), ndimage.find_objects(labels), strict=True):
        part = labels[rows, cols] == piece
        if np.count_nonzero(part) >= MIN_PIECE:
            polygons += [p + np.array((cols.start, rows.start)) for p in _outlines(part)]
    return [polygon.ravel().tolist() for polygon in polygons]


def _outlines(part: Pixels) -> list[NDArray[np.int64]]:
    """Outlines of a connected part, cut in two at the first of its holes, if any."""
    gaps, count = ndimage.label(~np.pad(part, 1), np.ones((3, 3)))
    if count == 1:
        return [_trace(part)]
    hole = ndimage.find_objects(gaps)[1]
    cut = (hole[1].start + hole[1].stop) // 2 - 1
    halves: list[NDArray[np.int64]] = []
    for start, half in ((0, part[:, :cut]), (cut, part[:, cut:])):
        labels, pieces = ndimage.label(half)
        for piece in range(1, pieces + 1):
            halves += [p + np.array((start, 0)) for p in _outlines(labels == piece)]
    return halves


def _trace(part: Pixels) -> NDArray[np.int64]:
    """Corners of the one outline, along pixel edges, of a connected part without holes."""
    padded = np.pad(part, 1).astype(np.int8)
    ends: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Walk with the part on the right: top edges eastward, right edges southward, and so on.
    down, right = np.diff(padded, axis=0), np.diff(padded, axis=1)
    sides: list[tuple[NDArray[np.bool_], tuple[int, int], tuple[int, int]]] = [
        (down[:, 1:-1] == 1, (0, 0), (1, 0)),
        (down[:, 1:-1] == -1, (1, 0), (-1, 0)),
        (right[1:-1] == 1, (0, 1), (0, -1)),
        (right[1:-1] == -1, (0, 0), (0, 1)),
    ]
    for edges, (dx, dy), step in sides:
        for y, x in np.argwhere(edges).tolist():
            ends.setdefault((x + dx, y + dy), []).append(step)
    return _walk(ends)


def _walk(ends: dict[tuple[int, int], list[tuple[int, int]]]) -> NDArray[np.int64]:
    x, y = start = min(ends)
    before = (0, 0)
    corners = []
    while ends[x, y]:
        steps = ends[x, y]
        # Where two pixels meet at a corner only, turn right: each stays within its own side.
        turn = (-before[1], before[0])
        step = turn if turn in steps else steps[0]
        steps.remove(step)
        if step != before:
            corners.append((x, y))
        x, y, before = x + step[0], y + step[1], step
        if (x, y) == start and not ends[start]:
            break
    return np.array(corners)
