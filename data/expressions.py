"""What RefShapes says about an object: meanings that single it out, and English for them.

A meaning is a small dataclass with `holds(scene)`: the objects it is clearly true of, or nothing
where people could argue (two objects almost equally far left, say). An expression is used only
where its meaning holds of its object alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, TypeVar

import numpy as np

from data.drawing import COLOURS, SHAPES
from data.scenes import Scene, Thing

Found = frozenset[int]
T = TypeVar("T")
NOTHING: Found = frozenset()

SIZE_RATIO = 1.6  # of areas, between "the big one" and the next
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

Weights = dict[str, float]
MIX: dict[str, Weights] = {
    "easy": {"attribute": 5, "location": 4, "size": 1.5, "relation": 0.5},
    "medium": {
        "attribute": 3,
        "location": 3,
        "size": 1.5,
        "texture": 2,
        "relation": 2.5,
        "ordinal": 1.5,
        "negation": 0.4,
    },
    "hard": {
        "attribute": 2,
        "location": 2,
        "size": 1.5,
        "texture": 2.5,
        "relation": 3,
        "ordinal": 2.5,
        "negation": 1,
    },
}


@dataclass(frozen=True)
class Kind:
    """Objects of a shape, colour and texture; None leaves open. `lacks` is (attribute, value)."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    lacks: tuple[str, str] | None = None

    def holds(self, scene: Scene) -> Found:
        return frozenset(i for i, thing in enumerate(scene.things) if self._fits(thing))

    def _fits(self, thing: Thing) -> bool:
        style = thing.style
        return (
            self.shape in (None, style.shape)
            and self.colour in (None, style.colour)
            and self.texture in (None, style.texture)
            and (self.lacks is None or getattr(style, self.lacks[0]) != self.lacks[1])
        )


@dataclass(frozen=True)
class Located:
    """The one of a kind on a side or in a corner, and no other of the kind is there."""

    side: str
    of: Kind

    def holds(self, scene: Scene) -> Found:
        group = sorted(self.of.holds(scene), key=lambda i: -_along(scene, i, self.side))
        if not group or _along(scene, group[0], self.side) < (0.03 if group[1:] else 0.1):
            return NOTHING
        if group[1:]:
            second = _along(scene, group[1], self.side)
            if second > _along(scene, group[0], self.side) - scene.gap or second > 0.06:
                return NOTHING
        return frozenset(group[:1])


@dataclass(frozen=True)
class Central:
    """The one of a kind in the middle of the picture, well away from its like."""

    of: Kind

    def holds(self, scene: Scene) -> Found:
        group = self.of.holds(scene)
        off = sorted((max(map(abs, _offset(scene, i))), i) for i in group)
        if not off or off[0][0] > 0.13 or any(far < 0.28 for far, _ in off[1:]):
            return NOTHING
        others = [_offset(scene, i) for _, i in off[1:]]
        # "The middle one" of three or more also lies between others.
        if len(others) > 1 and not any(min(along) < 0 < max(along) for along in zip(*others)):
            return NOTHING
        return frozenset([off[0][1]])


@dataclass(frozen=True)
class Ranked:
    """The n-th of a kind, counted from a side; the first is the leftmost and so on."""

    place: int
    side: str
    of: Kind

    def holds(self, scene: Scene) -> Found:
        group = sorted(self.of.holds(scene), key=lambda i: -_along(scene, i, self.side))
        if len(group) < max(2, self.place):
            return NOTHING
        steps = np.diff([-_along(scene, i, self.side) for i in group])
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
        pick = max if self.big else min
        best = pick(group, key=lambda i: scene.things[i].whole)
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
        truth = {i: _relates(scene, self.relation, i, mark) for i in group}
        # None: neither clearly true nor clearly false.
        return NOTHING if None in truth.values() else frozenset(i for i in group if truth[i])


@dataclass(frozen=True)
class Both:
    """Two meanings that each single out the same object: said together, true however they bind."""

    first: Sized
    second: Located | Central | Related

    def holds(self, scene: Scene) -> Found:
        found = self.first.holds(scene)
        return found if found == self.second.holds(scene) else NOTHING


Meaning = Kind | Located | Central | Ranked | Sized | Related | Both


def _offset(scene: Scene, index: int) -> tuple[float, float]:
    """Centre relative to the picture's middle, in shares of its sides."""
    x, y = scene.things[index].centre
    return x / scene.width - 0.5, y / scene.height - 0.5


def _along(scene: Scene, index: int, side: str) -> float:
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
    return {"is": type(meaning).__name__.lower()} | {k: v for k, v in plain.items() if v is not None}


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
    """Everything that can be said of each object and of no other.

    Args:
        rng: picks the words for landmarks, one description each.
        scene: the ground truth.
        textures: whether textures are worth a word in this level.

    Returns:
        For each object, meanings that hold of it alone; True where the bare kind would not do,
        or, for a bare kind, where no attribute of it could be spared.
    """
    found: list[list[tuple[Meaning, bool]]] = [[] for _ in scene.things]
    marks = list(_landmarks(rng, scene))
    for kind in _kinds(scene, textures):
        group = kind.holds(scene)
        if len(group) == 1 and kind != Kind():
            weaker = [replace(kind, **{a: None}) for a in ("shape", "colour", "texture")]
            spare = any(k != kind and k.holds(scene) == group for k in weaker)
            found[min(group)].append((kind, not spare))
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
            yield _pick(rng, unique)


def _joined(singles: Sequence[Meaning]) -> Iterator[Both]:
    sizes = [m for m in singles if isinstance(m, Sized)]
    places = [m for m in singles if isinstance(m, Located | Central | Related)]
    yield from (Both(size, place) for size, place in product(sizes, places))


# ---------------------------------------------------------------------------------------------
# English. Everything below chooses words only; `_pick` takes one of several ways to say a thing.

_NOUNS = {
    "circle": ("circle", "circle", "disc"),
    "moon": ("moon", "moon", "crescent"),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring", "ring", "donut"),
    "square": ("square", "square", "square", "box"),
}
_ANY = ("one", "one", "one", "thing", "shape", "object", "guy")
_LONG_ANY = ("shape", "shape", "object", "object", "one")
_TEXTURED = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
_WITH = {"striped": "stripes", "dotted": "spots", "checkered": "checks"}
_BEFORE = {
    "left": ("left", "left", "left", "left hand"),
    "right": ("right", "right", "right", "right hand"),
    "top": ("top", "top", "upper"),
    "bottom": ("bottom", "bottom", "lower"),
    "middle": ("middle", "middle", "center"),
}
_AFTER = {
    "left": ("on left", "on the left", "left", "left side", "on the left side"),
    "right": ("on right", "on the right", "right", "right side", "on the right side"),
    "top": ("at top", "up top", "at the top", "top"),
    "bottom": ("at bottom", "at the bottom", "on the bottom", "bottom"),
    "middle": ("in middle", "in the middle", "in the center", "in center"),
}
_LONG_AFTER = {
    "left": ("on the left side of the", "on the left of the", "at the left of the"),
    "right": ("on the right side of the", "on the right of the", "at the right of the"),
    "top": ("at the top of the", "near the top of the"),
    "bottom": ("at the bottom of the", "near the bottom of the"),
    "middle": ("in the middle of the", "in the center of the"),
}
_MOST = {
    "left": ("leftmost", "far left", "furthest left"),
    "right": ("rightmost", "far right", "furthest right"),
    "top": ("topmost", "highest", "uppermost"),
    "bottom": ("lowest", "bottommost", "lowest"),
}
_SIZES = {
    True: (("big", "big", "large"), ("biggest", "largest"), ("bigger", "larger")),
    False: (("small", "small", "little", "tiny"), ("smallest",), ("smaller",)),
}
_PLACES = ((), ("second", "2nd"), ("third", "3rd"), ("fourth", "4th"))
_RELATED = {
    "left of": ("left of", "to the left of", "to left of"),
    "right of": ("right of", "to the right of", "to right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "behind": ("behind", "behind", "partly behind", "partly hidden by"),
    "in front of": ("in front of", "partly covering"),
    "near": ("closest to", "nearest to", "nearest", "next to"),
}
_PICTURE = ("picture", "image", "photo")
_GLUE = (
    "a an the only that which is not a but without no with of from in at corner and pair dots bars"
)


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def vocabulary() -> list[str]:
    """Every word that an expression of any level can hold, sorted."""
    words = {w for w in _GLUE.split()} | set(COLOURS)

    def add(table: object) -> None:
        if isinstance(table, str):
            words.update(table.split())
        elif isinstance(table, dict):
            add(list(table.values()))
        elif isinstance(table, list | tuple):
            for entry in table:
                add(entry)

    add([list(SHAPES), _NOUNS, _ANY, _LONG_ANY, _TEXTURED, _WITH, _BEFORE, _AFTER, _LONG_AFTER])
    add([_MOST, _SIZES, _PLACES, _RELATED, _PICTURE])
    return sorted(words)


@dataclass(frozen=True)
class Speaker:
    """Puts meanings into words; `long` is RefCOCOg's manner, else RefCOCO's telegraphic one."""

    rng: np.random.Generator
    scene: Scene
    long: bool

    def say(self, meaning: Meaning) -> str:
        """Words for a meaning, lower-case and without punctuation."""
        match meaning:
            case Kind():
                return self._kind(meaning)
            case Located():
                return self._located(meaning)
            case Central():
                return self._at(meaning.of, "middle", "")
            case Ranked(place=1):
                return self._phrase(meaning.of, _pick(self.rng, _MOST[meaning.side]), "")
            case Ranked():
                return self._ranked(meaning)
            case Sized():
                return self._phrase(meaning.of, self._size(meaning), "")
            case Related():
                return self._phrase(meaning.of, "", self._relation(meaning))
            case Both():
                return self._both(meaning)

    def _chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def _both(self, meaning: Both) -> str:
        size, second = self._size(meaning.first), meaning.second
        if isinstance(second, Related):
            return self._phrase(second.of, size, self._relation(second))
        side = second.side if isinstance(second, Located) else "middle"
        return self._phrase(second.of, size, self._after(side))

    def _kind(self, kind: Kind) -> str:
        if not self.long or kind.lacks:
            return self._phrase(kind, "", "", bare=0.3)
        if self._chance(0.35):
            where = f"in the {_pick(self.rng, _PICTURE)}"
            return f"the only {self._noun_group(kind, 0)} {where}"
        if kind.colour and self._chance(0.4):
            link = _pick(self.rng, ("that is", "which is"))
            head = self._noun_group(replace(kind, colour=None, texture=None), 0)
            texture = f" and {_pick(self.rng, _TEXTURED[kind.texture])}" if kind.texture else ""
            return f"{self._article(head)} {head} {link} {kind.colour}{texture}"
        return self._phrase(kind, "", "")

    def _located(self, meaning: Located) -> str:
        return self._at(meaning.of, meaning.side, "corner" if " " in meaning.side else "")

    def _at(self, kind: Kind, side: str, corner: str) -> str:
        """A kind with its place before or after the noun; now and then the place alone."""
        if not self.long and kind == Kind() and self._chance(0.25):
            return f"{self._before(side)} {corner}".strip()
        if self._chance(0.2 if self.long else 0.55):
            return self._phrase(kind, self._before(side), "", bare=0.15)
        return self._phrase(kind, "", self._after(side), bare=0.15)

    def _before(self, side: str) -> str:
        if " " not in side:
            return _pick(self.rng, _BEFORE[side])
        upright, level = side.split()
        return f"{_pick(self.rng, _BEFORE[upright])} {level}"

    def _after(self, side: str) -> str:
        picture = _pick(self.rng, _PICTURE)
        if " " not in side:
            if self.long:
                return f"{_pick(self.rng, _LONG_AFTER[side])} {picture}"
            return _pick(self.rng, _AFTER[side])
        corner = self._before(side)
        if self.long:
            return f"in the {corner} corner of the {picture}"
        forms = (f"{corner} corner", f"in {corner}", f"in the {corner} corner", f"at the {corner}")
        return _pick(self.rng, (corner, *forms))

    def _ranked(self, meaning: Ranked) -> str:
        place = _pick(self.rng, _PLACES[meaning.place - 1])
        article = "the " if self.long or self._chance(0.4) else ""
        count = f"from {article}{meaning.side}"
        if self.long and self._chance(0.3):
            return self._phrase(meaning.of, "", f"that is {place} {count}")
        return self._phrase(meaning.of, place, count, bare=0.35)

    def _size(self, meaning: Sized) -> str:
        group = len(meaning.of.holds(self.scene))
        forms = _SIZES[meaning.big][: {1: 1, 2: 3}.get(group, 2)]
        return _pick(self.rng, _pick(self.rng, forms))

    def _relation(self, meaning: Related) -> str:
        words = _pick(self.rng, _RELATED[meaning.relation])
        if self.long and self._chance(0.35):
            words = f"that is {words}"
        mark = meaning.to
        if isinstance(mark, Sized):
            noun = f"{self._size(mark)} {self._noun_group(mark.of, 0)}"
        else:
            noun = self._noun_group(mark, 0)
        article = "the " if self.long or self._chance(0.5) else ""
        return f"{words} {article}{noun}"

    def _phrase(self, kind: Kind, before: str, after: str, bare: float = 0.0) -> str:
        """Article, words before, the kind, words after; `bare`: chance of leaving out the noun."""
        group = self._noun_group(kind, 0.0 if self.long else bare)
        phrase = " ".join(part for part in (before, group, after) if part)
        if self.long or self._chance(0.2):
            definite = before.endswith("most") or before.endswith("est") or self._chance(0.75)
            phrase = f"{'the' if definite or not self.long else self._article(phrase)} {phrase}"
        return phrase

    def _article(self, phrase: str) -> str:
        return "an" if phrase[0] in "aeiou" and not phrase.startswith("one") else "a"

    def _noun_group(self, kind: Kind, bare: float) -> str:
        texture, after = "", ""
        if kind.texture:
            texture = _pick(self.rng, _TEXTURED[kind.texture])
            if kind.texture in _WITH and self._chance(0.25):
                texture, after = "", f"with {_WITH[kind.texture]}"
        adjectives = [texture, kind.colour or ""]
        if self._chance(0.3):
            adjectives.reverse()
        noun = _pick(self.rng, _LONG_ANY if self.long else _ANY)
        if kind.shape:
            noun = _pick(self.rng, _NOUNS.get(kind.shape, (kind.shape,)))
        elif any(adjectives) and not after and not kind.lacks and self._chance(bare):
            noun = ""
        return " ".join(word for word in (*adjectives, noun, after, self._lack(kind)) if word)

    def _lack(self, kind: Kind) -> str:
        if not kind.lacks:
            return ""
        attribute, value = kind.lacks
        link = _pick(self.rng, ("that is not", "which is not") if self.long else ("that is not", "not"))
        if attribute == "shape":
            noun = _pick(self.rng, _NOUNS.get(value, (value,)))
            return f"{link} {self._article(noun)} {noun}"
        if attribute == "texture" and self._chance(0.4):
            return f"{_pick(self.rng, ('without', 'with no'))} {_WITH[value]}"
        return f"{link} {value if attribute == 'colour' else _pick(self.rng, _TEXTURED[value])}"


@dataclass(frozen=True)
class Expression:
    """A sentence as typed, its cleaned form, and what it means."""

    raw: str
    sent: str
    meaning: Meaning


def describe(
    rng: np.random.Generator,
    scene: Scene,
    options: Sequence[tuple[Meaning, bool]],
    weights: Weights,
    count: int,
    long: bool,
) -> list[Expression]:
    """Say up to `count` different things of one object.

    Args:
        rng: draws meanings and words.
        scene: the ground truth.
        options: the object's entry of `meanings`.
        weights: chance of each kind of expression, an entry of `MIX`.
        count: how many expressions; fewer if there are too few meanings.
        long: whole phrases as in RefCOCOg instead of telegraphic ones.
    """
    speaker = Speaker(rng, scene, long)
    by_kind: dict[str, list[tuple[Meaning, bool]]] = {}
    for option in options:
        by_kind.setdefault(kind_of(option[0]), []).append(option)
    names = [name for name in KINDS if name in by_kind and weights.get(name)]
    said: dict[str, Meaning] = {}
    for _ in range(4 * count if names else 0):
        chances = np.array([weights[name] for name in names])
        group = by_kind[names[int(rng.choice(len(names), p=chances / chances.sum()))]]
        needed = [option for option in group if option[1]]
        meaning = _choose(rng, needed if needed and rng.random() < 0.8 else group, long)
        said.setdefault(speaker.say(meaning), meaning)
        if len(said) == count:
            break
    return [Expression(_typed(rng, sent, long), sent, meaning) for sent, meaning in said.items()]


def _choose(
    rng: np.random.Generator, options: Sequence[tuple[Meaning, bool]], long: bool
) -> Meaning:
    """One meaning; a long expression prefers to name shape and colour."""
    if not long:
        return _pick(rng, options)[0]
    detail = np.array([1.0 + 3.0 * _details(meaning) ** 2 for meaning, _ in options])
    return options[int(rng.choice(len(options), p=detail / detail.sum()))][0]


def _details(meaning: Meaning) -> int:
    if isinstance(meaning, Both):
        return 1 + _details(meaning.second)
    kind = meaning if isinstance(meaning, Kind) else meaning.of
    return sum(part is not None for part in (kind.shape, kind.colour, kind.texture))


def _typed(rng: np.random.Generator, sent: str, long: bool) -> str:
    """The sentence as someone may have typed it: sometimes a capital, a full stop, or shouting."""
    draw = rng.random(3)
    if draw[0] < (0.4 if long else 0.12):
        sent = sent[0].upper() + sent[1:]
    if draw[1] < (0.4 if long else 0.06):
        sent += "."
    return sent.upper() if draw[2] < 0.01 and not long else sent
