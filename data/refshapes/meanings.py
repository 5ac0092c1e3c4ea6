"""Descriptions of an object in a RefShapes scene so that it means no other.

A meaning is a small dataclass with `holds(scene)`: the objects it is clearly true of, or nothing
where people could argue (two objects almost equally far left, say). An expression is used only
where its meaning holds of its object alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from data.refshapes.scenes import Scene, Style, Thing, pick

Found = frozenset[int]
NOTHING: Found = frozenset()

SIZE_RATIO = 1.6  # of areas, between "the big one" and the next
CORNER = 0.13  # distance from the middle, as a share of both sides, of "top left"
HIDDEN = 0.06  # share of an object that must be covered to be "behind" something
SIDES = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
RELATIONS = ("left of", "right of", "above", "below", "behind", "in front of", "near")
KINDS = ("attribute", "location", "size", "texture", "relation", "ordinal", "negation")


@dataclass(frozen=True)
class Kind:
    """Objects of a shape, colour and texture; None leaves open. `lacks` is (attribute, value)."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    lacks: tuple[str, str] | None = None

    def holds(self, scene: Scene) -> Found:
        return _members(self, scene)

    def fits(self, style: Style) -> bool:
        """Whether an object of this style is one of the kind."""
        return (
            self.shape in (None, style.shape)
            and self.colour in (None, style.colour)
            and self.texture in (None, style.texture)
            and (self.lacks is None or getattr(style, self.lacks[0]) != self.lacks[1])
        )


@lru_cache(maxsize=1024)  # every other meaning asks for a kind's members
def _members(kind: Kind, scene: Scene) -> Found:
    return frozenset(i for i, thing in enumerate(scene.things) if kind.fits(thing.style))


@dataclass(frozen=True)
class Located:
    """The one of a kind on a side or in a corner, and no other of the kind is there."""

    side: str
    of: Kind

    def holds(self, scene: Scene) -> Found:
        group = sorted(self.of.holds(scene), key=lambda i: -along(scene, i, self.side))
        reach = [along(scene, i, self.side) for i in group]
        if not group or reach[0] < self._least(len(group) == 1):
            return NOTHING
        if group[1:] and reach[1] > min(0.05, reach[0] - scene.gap):
            return NOTHING
        return frozenset(group[:1])

    def _least(self, lone: bool) -> float:
        """How far out it must lie: "top left" promises more than "left" does."""
        return CORNER if " " in self.side else 0.1 if lone else 0.05


@dataclass(frozen=True)
class Central:
    """The one of a kind in the middle of the image, well away from its like."""

    of: Kind

    def holds(self, scene: Scene) -> Found:
        off = sorted((max(map(abs, _offset(scene, i))), i) for i in self.of.holds(scene))
        if not off or off[0][0] > 0.13 or any(far < 0.28 for far, _ in off[1:]):
            return NOTHING
        # "The middle one" of three or more also lies between others.
        others = np.array([_offset(scene, i) for _, i in off[1:]])
        if len(others) > 1 and not np.any((others.min(0) < 0) & (others.max(0) > 0)):
            return NOTHING
        return frozenset([off[0][1]])


@dataclass(frozen=True)
class Ranked:
    """The n-th of a kind, counted from a side; the first is the leftmost and so on."""

    place: int
    side: str
    of: Kind

    def holds(self, scene: Scene) -> Found:
        group = sorted(self.of.holds(scene), key=lambda i: -along(scene, i, self.side))
        if len(group) < max(2, self.place):
            return NOTHING
        steps = np.diff([-along(scene, i, self.side) for i in group])
        if min(steps[max(0, self.place - 2) : self.place]) < scene.gap or min(steps) < 0.03:
            return NOTHING
        return frozenset([group[self.place - 1]])


@dataclass(frozen=True)
class Sized:
    """The clearly biggest or smallest of a kind; a lone one is compared with all other objects."""

    big: bool
    of: Kind

    def holds(self, scene: Scene) -> Found:
        group = self.of.holds(scene)
        if not group:
            return NOTHING
        extreme = max if self.big else min
        best = extreme(group, key=lambda i: scene.things[i].whole)
        rivals = group - {best} or frozenset(range(len(scene.things))) - {best}
        clear = all(self._beats(scene.things[best], scene.things[i]) for i in rivals)
        return frozenset([best]) if clear and rivals else NOTHING

    def _beats(self, one: Thing, other: Thing) -> bool:
        more, less = (one, other) if self.big else (other, one)
        return (
            more.whole >= SIZE_RATIO * less.whole
            and more.area >= SIZE_RATIO * less.area
            and more.extent >= 1.15 * less.extent
        )


@dataclass(frozen=True)
class Related:
    """The one of a kind that stands in a relation to a landmark."""

    relation: str
    of: Kind
    to: "Kind | Sized"

    def holds(self, scene: Scene) -> Found:
        marks = self.to.holds(scene)
        if len(marks) != 1:
            return NOTHING
        (mark,) = marks
        group = self.of.holds(scene) - marks
        if self.relation == "near":
            return _nearest(scene, group, mark)
        related = {i: _relates(scene, self.relation, i, mark) for i in group}
        # None: neither clearly true nor clearly false.
        return NOTHING if None in related.values() else frozenset(i for i in group if related[i])


@dataclass(frozen=True)
class Both:
    """Two meanings that each single out the same object: used together, true however they bind."""

    first: Sized
    second: Located | Central | Related

    def holds(self, scene: Scene) -> Found:
        found = self.first.holds(scene)
        return found if found == self.second.holds(scene) else NOTHING


Meaning = Kind | Located | Central | Ranked | Sized | Related | Both


def _offset(scene: Scene, index: int) -> tuple[float, float]:
    """Centre relative to the image's middle, as fractions of its sides."""
    x, y = scene.things[index].centre
    return x / scene.width - 0.5, y / scene.height - 0.5


def along(scene: Scene, index: int, side: str) -> float:
    """How far an object lies towards a side or into a corner; 0 in the middle."""
    offset = _offset(scene, index)
    return min(sign * part for sign, part in zip(SIDES[side], offset, strict=True) if sign)


def _relates(scene: Scene, relation: str, index: int, mark: int) -> bool | None:
    one, other = scene.things[index], scene.things[mark]
    if relation in ("behind", "in front of"):
        below, top = (one, mark) if relation == "behind" else (other, index)
        hidden = below.hidden_by.get(top, 0.0)
        return None if 0 < hidden < HIDDEN else hidden > 0
    axis = 0 if relation in ("left of", "right of") else 1
    sign = 1 if relation in ("left of", "above") else -1
    ahead = sign * (other.centre[axis] - one.centre[axis])
    aside = abs(other.centre[1 - axis] - one.centre[1 - axis])
    side = (scene.width, scene.height)[axis]
    if ahead <= 0.01 * side:
        return False
    return True if ahead >= scene.gap * side and aside <= 0.9 * ahead else None


def _nearest(scene: Scene, group: Iterable[int], mark: int) -> Found:
    """The object clearly nearest to a landmark, by centres and by edges both."""
    landmark = scene.things[mark]

    def distance(index: int) -> float:
        return float(np.hypot(*np.subtract(scene.things[index].centre, landmark.centre)))

    def clearance(index: int) -> float:
        return distance(index) - (scene.things[index].extent + landmark.extent) / 2

    ranked = sorted(group, key=distance)
    if len(ranked) < 2:
        return NOTHING
    apart = scene.gap * float(np.hypot(scene.width, scene.height)) / 2
    best = ranked[0]
    clear = all(
        distance(i) > 1.5 * distance(best) and clearance(i) > clearance(best) + apart
        for i in ranked[1:]
    )
    return frozenset([best]) if clear else NOTHING


def kind_of(meaning: Meaning) -> str:
    """The ability an expression asks for most, one of `KINDS`."""
    match meaning:
        case Kind(lacks=None):
            return "texture" if meaning.texture else "attribute"
        case Kind():
            return "negation"
        case Both():
            return kind_of(meaning.second)
        case Ranked(place=1) | Located() | Central():
            return "location"
        case Ranked():
            return "ordinal"
        case Sized():
            return "size"
        case Related():
            return "relation"


def as_json(meaning: Meaning) -> dict[str, Any]:
    """A meaning as nested plain dicts, each with its class under "is"."""
    plain = asdict(meaning)
    for key in plain:
        part = getattr(meaning, key)
        if isinstance(part, Meaning):
            plain[key] = as_json(part)
    return {"is": type(meaning).__name__.lower()} | {
        k: v for k, v in plain.items() if v is not None
    }


def uses_place(meaning: Meaning) -> bool:
    """Whether a meaning says where something is, which RefCOCO+ leaves out."""
    match meaning:
        case Both():
            return uses_place(meaning.second)
        case Related():
            return meaning.relation not in ("behind", "in front of")
    return not isinstance(meaning, Kind | Sized)


def meanings(
    rng: np.random.Generator, scene: Scene, textures: bool
) -> list[list[tuple[Meaning, bool]]]:
    """All descriptions that hold for each object and for no other.

    Args:
        rng: picks the words for landmarks, one description each.
        scene: the ground truth.
        textures: whether textures are worth a word in this level.

    Returns:
        For each object, meanings that hold of it alone; True where the bare kind would not do,
        or, for a bare kind, where no attribute of it could be left out.
    """
    found: list[list[tuple[Meaning, bool]]] = [[] for _ in scene.things]
    marks = list(_landmarks(rng, scene))
    for kind in _kinds(scene, textures):
        group = kind.holds(scene)
        if len(group) == 1 and kind != Kind():
            weaker = [replace(kind, **{a: None}) for a in ("shape", "colour", "texture")]
            needless = any(k != kind and k.holds(scene) == group for k in weaker)
            found[min(group)].append((kind, not needless))
        singles = [(m, m.holds(scene)) for m in _about(scene, kind, group, marks)]
        singles += [(m, m.holds(scene)) for m in _joined([m for m, only in singles if only])]
        for meaning, only in singles:
            if len(only) == 1:
                found[min(only)].append((meaning, len(group) > 1))
    return found


def _kinds(scene: Scene, textures: bool) -> list[Kind]:
    """Every combination of attributes that some object has."""
    kinds = {
        Kind(*choice): None
        for style in (thing.style for thing in scene.things)
        for choice in product(
            (None, style.shape),
            (None, style.colour),
            (None, style.texture) if textures else (None,),
        )
    }
    return list(kinds)


def _about(
    scene: Scene, kind: Kind, group: Found, marks: Sequence[Kind | Sized]
) -> Iterator[Meaning]:
    yield from (Located(side, kind) for side in SIDES)
    yield Central(kind)
    yield from (Sized(big, kind) for big in (True, False))
    yield from (Related(relation, kind, mark) for mark in marks for relation in RELATIONS)
    if len(group) < 2:
        return
    # Counting from the near side comes naturally; "sixth from left" does not.
    last = min(4, (len(group) + 1) // 2)
    for side in ("left", "right", "top", "bottom"):
        yield from (Ranked(place, side, kind) for place in range(1, last + 1))
    for attribute in ("colour", "shape", "texture"):
        if getattr(kind, attribute) is None:
            values = {getattr(scene.things[i].style, attribute) for i in group} - {"plain"}
            yield from (replace(kind, lacks=(attribute, value)) for value in sorted(values))


def _landmarks(rng: np.random.Generator, scene: Scene) -> Iterator[Kind | Sized]:
    """One short description of each object that has any."""
    for index, thing in enumerate(scene.things):
        style = thing.style
        options: list[Kind | Sized] = [
            Kind(shape=style.shape),
            Kind(shape=style.shape, colour=style.colour),
            Kind(colour=style.colour),
        ]
        if style.texture != "plain":
            options.append(Kind(shape=style.shape, texture=style.texture))
        options += [Sized(big, Kind(shape=style.shape)) for big in (True, False)]
        unique = [mark for mark in options if mark.holds(scene) == frozenset([index])]
        if unique:
            yield pick(rng, unique)


def _joined(singles: Sequence[Meaning]) -> Iterator[Both]:
    sizes = [m for m in singles if isinstance(m, Sized)]
    places = [m for m in singles if isinstance(m, Located | Central | Related)]
    yield from (Both(size, place) for size, place in product(sizes, places))
