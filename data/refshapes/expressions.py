"""English for the meanings of RefShapes, in the manner of RefCOCO's and RefCOCOg's annotators.

Of several ways to say a thing, the tables list the commonest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

import numpy as np

from data.refshapes.drawing import COLOURS, SHAPES
from data.refshapes.meanings import (
    KINDS,
    Both,
    Central,
    Kind,
    Located,
    Meaning,
    Ranked,
    Related,
    Sized,
    along,
    kind_of,
)
from data.refshapes.scenes import Scene, pick, pick_weighted

Weights = dict[str, float]
MIX: dict[str, Weights] = {
    "easy": {"attribute": 8, "location": 4, "size": 3, "relation": 0.3},
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

_NOUNS = {
    "circle": ("circle", "disc"),
    "moon": ("moon", "crescent"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "donut"),
    "square": ("square", "box"),
}
_ANY = ("one", "thing", "shape", "object", "guy")
_LONG_ANY = ("shape", "object", "one")
_TEXTURED = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
_WITH = {"striped": "stripes", "dotted": "spots", "checkered": "checks"}
_BEFORE = {
    "left": ("left", "left hand"),
    "right": ("right", "right hand"),
    "top": ("top", "upper"),
    "bottom": ("bottom", "lower"),
    "middle": ("middle", "center"),
}
_AFTER = {
    "left": ("on left", "on the left", "left", "left side", "on the left side"),
    "right": ("on right", "on the right", "right", "right side", "on the right side"),
    "top": ("at top", "at the top", "top", "up top"),
    "bottom": ("at bottom", "at the bottom", "bottom", "on the bottom"),
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
    "top": ("highest", "topmost", "uppermost"),
    "bottom": ("lowest", "bottommost"),
}
_SIZES = {
    True: (("big", "large"), ("biggest", "largest"), ("bigger", "larger")),
    False: (("small", "little"), ("smallest",), ("smaller",)),
}
_PLACES = {2: ("second", "2nd"), 3: ("third", "3rd"), 4: ("fourth", "4th")}
_RELATED = {
    "left of": ("left of", "to the left of", "to left of"),
    "right of": ("right of", "to the right of", "to right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
    "behind": ("behind", "partly behind", "partly hidden by"),
    "in front of": ("in front of", "partly covering"),
    "near": ("closest to", "next to", "nearest to", "nearest"),
}
_IMAGE = ("picture", "image", "photo")
_GLUE = "a an the only that which is not without no with of from in on at corner and"


def _word(rng: np.random.Generator, ways: Sequence[str]) -> str:
    """One of several ways to say a thing, earlier ones more often."""
    return pick_weighted(rng, ways, (rank**-1.3 for rank in range(1, len(ways) + 1)))


def vocabulary() -> list[str]:
    """Every word that an expression of any level can hold, sorted."""
    words = {*_GLUE.split(), *COLOURS}

    def add(table: object) -> None:
        if isinstance(table, str):
            words.update(table.split())
        elif isinstance(table, dict):
            add(list(table.values()))
        elif isinstance(table, list | tuple):
            for entry in table:
                add(entry)

    add([list(SHAPES), _NOUNS, _ANY, _LONG_ANY, _TEXTURED, _WITH, _BEFORE, _AFTER, _LONG_AFTER])
    add([_MOST, _SIZES, _PLACES, _RELATED, _IMAGE])
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
                return self._at(meaning, meaning.side)
            case Central():
                return self._at(meaning, "middle")
            case Ranked(place=1):
                return self._phrase(meaning.of, _word(self.rng, _MOST[meaning.side]), "")
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
        return self._phrase(second.of, size, self._after(second, side))

    def _kind(self, kind: Kind) -> str:
        if not self.long or kind.lacks:
            return self._phrase(kind, "", "", bare=0.3)
        if self._chance(0.35):
            where = f"in the {_word(self.rng, _IMAGE)}"
            return f"the only {self._noun_group(kind, 0)} {where}"
        if kind.colour and self._chance(0.4):
            link = _word(self.rng, ("that is", "which is"))
            head = self._noun_group(replace(kind, colour=None, texture=None), 0)
            texture = f" and {_word(self.rng, _TEXTURED[kind.texture])}" if kind.texture else ""
            return f"{self._article(head)} {head} {link} {kind.colour}{texture}"
        return self._phrase(kind, "", "")

    def _at(self, meaning: Located | Central, side: str) -> str:
        """A kind with its place before or after the noun; now and then the place alone."""
        kind = meaning.of
        if not self.long and kind == Kind() and self._chance(0.2):
            return self._before(side)
        if self._chance(0.2 if self.long else 0.55):
            return self._phrase(kind, self._before(side), "", bare=0.15)
        return self._phrase(kind, "", self._after(meaning, side), bare=0.15)

    def _before(self, side: str) -> str:
        if " " not in side:
            return _word(self.rng, _BEFORE[side])
        upright, level = side.split()
        return f"{_word(self.rng, _BEFORE[upright])} {level}"

    def _after(self, meaning: Located | Central, side: str) -> str:
        noun = _word(self.rng, _IMAGE)
        if " " not in side:
            if self.long:
                return f"{_word(self.rng, _LONG_AFTER[side])} {noun}"
            return _word(self.rng, _AFTER[side])
        (target,) = meaning.holds(self.scene)
        corner, tucked = self._before(side), along(self.scene, target, side) > 0.2
        if self.long:
            return f"in the {corner}{' corner' if tucked else ''} of the {noun}"
        forms = [corner, f"on {corner}", f"at the {corner}"]
        if tucked:
            forms += [f"{corner} corner", f"in the {corner} corner"]
        return pick(self.rng, forms)

    def _ranked(self, meaning: Ranked) -> str:
        places = _PLACES[meaning.place]
        place = places[0] if self.long else _word(self.rng, places)
        article = "the " if self.long or self._chance(0.4) else ""
        count = f"from {article}{meaning.side}"
        if self.long and self._chance(0.3):
            return self._phrase(meaning.of, "", f"that is {place} {count}")
        return self._phrase(meaning.of, place, count, bare=0.35)

    def _size(self, meaning: Sized) -> str:
        group = len(meaning.of.holds(self.scene))
        # "Biggest" needs a second one, "bigger" exactly two.
        forms = _SIZES[meaning.big][: {1: 1, 2: 3}.get(group, 2)]
        return _word(self.rng, pick(self.rng, forms))

    def _relation(self, meaning: Related) -> str:
        words = _word(self.rng, _RELATED[meaning.relation])
        if words == "under" and self._touch(meaning):
            words = "below"  # "under" could mean "behind"
        if self.long and self._chance(0.35):
            words = f"that is {words}"
        mark = meaning.to
        if isinstance(mark, Sized):
            noun = f"{self._size(mark)} {self._noun_group(mark.of, 0)}"
        else:
            noun = self._noun_group(mark, 0)
        article = "the " if self.long or self._chance(0.5) else ""
        return f"{words} {article}{noun}"

    def _touch(self, meaning: Related) -> bool:
        (target,), (mark,) = meaning.holds(self.scene), meaning.to.holds(self.scene)
        things = self.scene.things
        return mark in things[target].hidden_by or target in things[mark].hidden_by

    def _phrase(self, kind: Kind, before: str, after: str, bare: float = 0.0) -> str:
        """Article, words before, the kind, words after; `bare`: chance of leaving out the noun."""
        group = self._noun_group(kind, 0.0 if self.long else bare)
        phrase = " ".join(part for part in (before, group, after) if part)
        if self.long:
            # Only a size or nothing in front leaves room for "a": "a second star" is another thing.
            vague = before in ("", *_SIZES[True][0], *_SIZES[False][0]) and " from " not in after
            the = not vague or "one" in group.split() or self._chance(0.75)
            return f"{'the' if the else self._article(phrase)} {phrase}"
        noun = kind.shape or set(group.split()) & set(_ANY)
        return f"the {phrase}" if noun and self._chance(0.2) else phrase

    def _article(self, phrase: str) -> str:
        return "an" if phrase[0] in "aeiou" and not phrase.startswith("one") else "a"

    def _noun_group(self, kind: Kind, bare: float) -> str:
        texture, after = "", ""
        if kind.texture:
            texture = _word(self.rng, _TEXTURED[kind.texture])
            if kind.texture in _WITH and self._chance(0.25):
                texture, after = "", f"with {_WITH[kind.texture]}"
        adjectives = [texture, kind.colour or ""]
        if kind.texture != "plain" and self._chance(0.3):
            adjectives.reverse()
        noun = _word(self.rng, _LONG_ANY if self.long else _ANY)
        if kind.shape:
            noun = _word(self.rng, _NOUNS.get(kind.shape, (kind.shape,)))
        elif any(adjectives) and not after and not kind.lacks and self._chance(bare):
            noun = ""
        return " ".join(word for word in (*adjectives, noun, after, self._lack(kind)) if word)

    def _lack(self, kind: Kind) -> str:
        if not kind.lacks:
            return ""
        attribute, value = kind.lacks
        link = _word(
            self.rng, ("that is not", "which is not") if self.long else ("that is not", "not")
        )
        if attribute == "shape":
            noun = _word(self.rng, _NOUNS.get(value, (value,)))
            return f"{link} {self._article(noun)} {noun}"
        if attribute == "texture" and self._chance(0.4):
            return f"{_word(self.rng, ('without', 'with no'))} {_WITH[value]}"
        return f"{link} {value if attribute == 'colour' else _word(self.rng, _TEXTURED[value])}"


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
    # A relation or a texture that is not needed is a mouthful: people say the short thing.
    chances = [
        weights[name] * (1 if name == "attribute" or any(o[1] for o in by_kind[name]) else 0.3)
        for name in names
    ]
    meanings_by_text: dict[str, Meaning] = {}
    for _ in range(4 * count if names else 0):
        group = by_kind[pick_weighted(rng, names, chances)]
        needed = [option for option in group if option[1]]
        meaning = _choose(rng, needed if needed and rng.random() < 0.8 else group, long)
        meanings_by_text.setdefault(speaker.say(meaning), meaning)
        if len(meanings_by_text) == count:
            break
    return [
        Expression(_typed(rng, sent, long), sent, meaning)
        for sent, meaning in meanings_by_text.items()
    ]


def _choose(
    rng: np.random.Generator, options: Sequence[tuple[Meaning, bool]], long: bool
) -> Meaning:
    """One meaning; "left" beats "leftmost", "plain" is rare, long expressions give more detail."""
    detail = [1.0 + (3.0 * _details(meaning) ** 2 if long else 0.0) for meaning, _ in options]
    usual = [_usual(meaning) for meaning, _ in options]
    return pick_weighted(rng, options, map(mul, detail, usual))[0]


def _usual(meaning: Meaning) -> float:
    """How often people would take this way to say it, relative to others."""
    if isinstance(meaning, Both):
        return 0.4 * _usual(meaning.second)
    kind = meaning if isinstance(meaning, Kind) else meaning.of
    often = 3.0 if isinstance(meaning, Located | Central) else 1.0
    return often * (0.3 if kind.texture == "plain" else 1.0)


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
