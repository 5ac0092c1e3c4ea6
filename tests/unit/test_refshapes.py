"""RefShapes: layout, determinism, masks, and that every expression is true of one object only.

The last is proven without the generator's own meanings: `Reader` parses the English again and
evaluates it, with its own thresholds, on the objects of `refshapes.json`.
"""

import hashlib
import json
import pickle
import pickletools
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from transformers import AutoConfig, AutoModel, AutoTokenizer

from data.refshapes.drawing import COLOURS, SHAPES, visible_polygons
from data.refshapes.generate import IMAGES, generate, main
from data.refshapes.scenes import LEVELS, sample_scene

PICKLES = (
    ("refcoco", "unc"),
    ("refcoco+", "unc"),
    ("refcocog", "umd"),
    ("refcocog", "google"),
)
SCENES = {"easy": 220, "medium": 180, "hard": 160}

Json = dict[str, Any]


class Root:
    """A written root, read back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.truth: Json = json.loads((path / "refshapes.json").read_text())
        self.scenes: dict[int, Json] = {s["image_id"]: s for s in self.truth["scenes"]}
        self.refs = {key: self._load(*key) for key in PICKLES}
        self.instances: dict[str, Json] = {
            name: json.loads((path / name / "instances.json").read_text())
            for name in ("refcoco", "refcoco+", "refcocog")
        }

    def _load(self, name: str, split_by: str) -> list[Json]:
        data = (self.path / name / f"refs({split_by}).p").read_bytes()
        refs: list[Json] = pickle.loads(data, encoding="latin1")
        return refs

    def sentences(self, name: str) -> list[tuple[Json, Json]]:
        split_by = "umd" if name == "refcocog" else "unc"
        return [(ref, line) for ref in self.refs[name, split_by] for line in ref["sentences"]]


@pytest.fixture(scope="module", params=list(LEVELS))
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Root:
    path = tmp_path_factory.mktemp(request.param) / "root"
    generate(path, request.param, 3, SCENES[request.param], val_scenes=30, test_scenes=20)
    return Root(path)


# --- The second opinion on what expressions mean -----------------------------------------------

TEXTURES = {
    "plain": "plain",
    "solid": "plain",
    "striped": "striped",
    "stripy": "striped",
    "stripes": "striped",
    "dotted": "dotted",
    "spotted": "dotted",
    "spots": "dotted",
    "checkered": "checkered",
    "checked": "checkered",
    "checks": "checkered",
}
NAMES = {name: name for name in SHAPES} | {
    "disc": "circle",
    "crescent": "moon",
    "plus": "cross",
    "donut": "ring",
    "box": "square",
}
ANYTHING = ("one", "thing", "shape", "object", "guy")
BIG = ("big", "large", "bigger", "larger", "biggest", "largest")
SMALL = ("small", "little", "smaller", "smallest")
COUNT = {"second": 2, "2nd": 2, "third": 3, "3rd": 3, "fourth": 4, "4th": 4}
EXTREME = {
    "leftmost": "left",
    "far left": "left",
    "furthest left": "left",
    "rightmost": "right",
    "far right": "right",
    "furthest right": "right",
    "highest": "top",
    "topmost": "top",
    "uppermost": "top",
    "lowest": "bottom",
    "bottommost": "bottom",
}
UPRIGHT = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
PLACE = UPRIGHT | {"left": "left", "right": "right", "left hand": "left", "right hand": "right"}
PLACE |= {"middle": "middle", "center": "middle"}
PLACE |= {f"{u} {side}": f"{UPRIGHT[u]} {side}" for u, side in product(UPRIGHT, ("left", "right"))}
RELATION = {
    "left of": "left",
    "to left of": "left",
    "to the left of": "left",
    "right of": "right",
    "to right of": "right",
    "to the right of": "right",
    "above": "top",
    "higher than": "top",
    "below": "bottom",
    "under": "bottom",
    "lower than": "bottom",
    "behind": "behind",
    "partly behind": "behind",
    "partly hidden by": "behind",
    "in front of": "front",
    "partly covering": "front",
    "closest to": "near",
    "next to": "near",
    "nearest to": "near",
    "nearest": "near",
}
EMPTY = [
    *("the", "a", "an", "only", "that is", "which is", "and", "on", "on the", "at", "at the"),
    *("in", "in the", "near the", "up", "side", "corner"),
    *(f"{w} the {noun}" for w, noun in product(("of", "in"), ("picture", "image", "photo"))),
]

Group = list[Json]
Test = Callable[[Group], Group]


class Reader:
    """Reads one noun phrase of a scene's description and finds what it can mean."""

    def __init__(self, scene: Json, text: str) -> None:
        self.scene = scene
        self.text = text
        self.wanted: dict[str, str] = {}
        self.unwanted: list[tuple[str, str]] = []
        self.tests: list[Test] = []
        self.count = 0
        while self.text:
            self._step()

    def meant(self) -> Group:
        """Objects that some reading takes the phrase to mean."""
        base = [o for o in self.scene["objects"] if self._is(o)]
        result = [test(base) for test in self.tests]
        if any(len(group) != 1 for group in result):
            return []
        for group in result:
            base = [o for o in base if o in group]
        return base

    def _is(self, thing: Json) -> bool:
        return all(thing[k] == v for k, v in self.wanted.items()) and all(
            thing[k] != v for k, v in self.unwanted
        )

    def _take(self, phrases: Any) -> str:
        """Take the longest of the phrases that the text starts with off it."""
        fits = [p for p in phrases if f"{self.text} ".startswith(f"{p} ")]
        best = max(fits, key=len, default="")
        self.text = self.text[len(best) :].strip()
        return best

    def _step(self) -> None:
        if self._relation() or self._ordinal() or self._lack() or self._attribute():
            return
        if word := self._take(EXTREME):
            self._add(self._farthest, EXTREME[word])
        elif word := self._take(PLACE):
            self._add(self._at, PLACE[word])
        elif word := self._take([*BIG, *SMALL]):
            self._add(self._size, word in BIG)
        elif not self._take(EMPTY) and not self._take(ANYTHING):
            pytest.fail(f"cannot read {self.text!r}")

    def _add(self, test: Callable[..., Group], *args: Any) -> None:
        self.tests.append(lambda group: test(group, *args))

    def _relation(self) -> bool:
        if re.match(r"(left|right) of the (picture|image|photo)$", self.text):
            return False
        if word := self._take(RELATION):
            marks = Reader(self.scene, self.text).meant()
            assert len(marks) == 1, f"landmark {self.text!r}"
            self.text = ""
            self._add(self._related, RELATION[word], marks[0])
        return bool(word)

    def _ordinal(self) -> bool:
        if word := self._take(COUNT):
            self.count = COUNT[word]
        elif self._take(["from", "from the"]):
            self._add(self._counted, self.count, self._take(("left", "right", "top", "bottom")))
            return True
        return bool(word)

    def _lack(self) -> bool:
        if not self._take(["not", "not a", "not an", "without", "with no"]):
            return False
        word = self._take([*COLOURS, *TEXTURES, *NAMES])
        if word in COLOURS:
            self.unwanted.append(("colour", word))
        elif word in TEXTURES:
            self.unwanted.append(("texture", TEXTURES[word]))
        else:
            self.unwanted.append(("shape", NAMES[word]))
        return True

    def _attribute(self) -> bool:
        self._take(["with"])
        if word := self._take(COLOURS):
            self.wanted["colour"] = word
        elif word := self._take(TEXTURES):
            self.wanted["texture"] = TEXTURES[word]
        elif word := self._take(NAMES):
            self.wanted["shape"] = NAMES[word]
        return bool(word)

    def _out(self, thing: Json, side: str) -> float:
        """0 at the opposite edge of the image, 1 at the edge of this side."""
        axis = 0 if side in ("left", "right") else 1
        share = thing["centre"][axis] / (self.scene["width"], self.scene["height"])[axis]
        return float(share if side in ("right", "bottom") else 1 - share)

    def _at(self, group: Group, side: str) -> Group:
        if side == "middle":
            off = [max(abs(self._out(o, s) - 0.5) for s in ("left", "top")) for o in group]
            near = [o for o, far in zip(group, off, strict=True) if far < 0.25]
            return near if len(near) == 1 and min(off) < 0.15 else []
        parts = side.split()
        reach = [min(self._out(o, part) for part in parts) for o in group]
        # Of two stars near the left edge neither is "the left star", even if one is farther out.
        best = max(reach, default=0.0)
        alone = sum(r > best - 0.05 for r in reach) == 1 and sum(r > 0.56 for r in reach) <= 1
        clear = alone and best > (0.62 if len(parts) == 2 else 0.54)
        return [o for o, r in zip(group, reach, strict=True) if clear and r == best]

    def _farthest(self, group: Group, side: str) -> Group:
        return self._counted(group, 1, side) if len(group) > 1 else []

    def _counted(self, group: Group, place: int, side: str) -> Group:
        row = sorted(group, key=lambda o: -self._out(o, side))
        if not 0 < place <= len(row):
            return []
        one = row[place - 1]
        rivals = [o for o in row if o is not one]
        clear = all(abs(self._out(o, side) - self._out(one, side)) > 0.05 for o in rivals)
        return [one] if clear else []

    def _size(self, group: Group, big: bool) -> Group:
        rivals = group if len(group) > 1 else self.scene["objects"]
        sign = 1 if big else -1
        return [
            one
            for one in group
            if all(
                (one[key] / o[key]) ** sign > 1.5
                for o in rivals
                if o is not one
                for key in ("whole", "area")
            )
        ]

    def _related(self, group: Group, relation: str, mark: Json) -> Group:
        others = [o for o in group if o is not mark]
        if relation == "near":
            far = sorted((float(np.hypot(*self._shift(o, mark))), o["ann_id"]) for o in others)
            lone = len(far) > 1 and far[1][0] > 1.4 * far[0][0]
            return [o for o in others if lone and o["ann_id"] == far[0][1]]
        clear, possible = [], []
        for one in others:
            sure, maybe = self._stands(one, relation, mark)
            clear += [one] if sure else []
            possible += [one] if maybe else []
        return clear if clear == possible else []

    def _stands(self, one: Json, relation: str, mark: Json) -> tuple[bool, bool]:
        """Whether a relation clearly holds, and whether someone could say so."""
        if relation in ("behind", "front"):
            below, top = (one, mark) if relation == "behind" else (mark, one)
            hidden = below["hidden_by"].get(str(top["z"]), 0)
            return hidden > 0.05, hidden > 0
        ahead = self._out(one, relation) - self._out(mark, relation)
        dx, dy = np.abs(self._shift(one, mark))
        straight = dy < dx if relation in ("left", "right") else dx < dy
        return ahead > 0.07 and bool(straight), ahead > 0.02

    def _shift(self, one: Json, other: Json) -> np.ndarray:
        return np.subtract(one["centre"], other["centre"])


def test_the_second_opinion_objects() -> None:
    """The evaluator itself tells true from false and clear from unclear."""

    def thing(ann_id: int, shape: str, x: float, area: int = 900) -> Json:
        base = {"ann_id": ann_id, "shape": shape, "colour": "red", "texture": "plain"}
        return base | {"centre": [x, 50], "area": area, "whole": area, "hidden_by": {}, "z": ann_id}

    things = [thing(0, "star", 20), thing(1, "star", 80), thing(2, "heart", 50, 3000)]
    scene = {"width": 100, "height": 100, "objects": things}

    def meant(text: str) -> list[int]:
        return [o["ann_id"] for o in Reader(scene, text).meant()]

    assert meant("left star") == meant("the star left of the heart") == [0]
    assert meant("second one from right") == meant("biggest one") == meant("not a star") == [2]
    assert meant("star") == [0, 1]
    assert meant("star at the top") == meant("big star") == meant("star closest to the heart") == []
    things[1]["centre"][0] = 22
    assert meant("left star") == meant("leftmost star") == meant("star left of heart") == []


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_every_expression_is_true_of_its_object_only(root: Root, name: str) -> None:
    wrong = []
    for ref, line in root.sentences(name):
        result = Reader(root.scenes[ref["image_id"]], line["sent"]).meant()
        if [o["ann_id"] for o in result] != [ref["ann_id"]]:
            wrong.append((ref["image_id"], ref["ann_id"], line["sent"]))
    assert len(root.sentences(name)) > 300
    assert not wrong


# --- Layout ----------------------------------------------------------------------------------


def test_refs_and_instances_have_the_published_form(root: Root) -> None:
    keys = ["ann_id", "category_id", "file_name", "image_id", "ref_id", "sent_ids"]
    keys += ["sentences", "split"]
    for (name, _), refs in root.refs.items():
        tables = {
            table: {row["id"]: row for row in root.instances[name][table]}
            for table in ("images", "annotations", "categories")
        }
        assert {r["image_id"] for r in refs} == set(tables["images"])
        assert {r["ann_id"] for r in refs} == set(tables["annotations"])
        assert {r["category_id"] for r in refs} == set(tables["categories"])
        assert len({r["ref_id"] for r in refs}) == len(refs)
        for ref in refs:
            assert sorted(ref) == keys
            image = tables["images"][ref["image_id"]]
            assert ref["file_name"] == image["file_name"][:-4] + f"_{ref['ann_id']}.jpg"
            assert ref["sent_ids"] == [line["sent_id"] for line in ref["sentences"]]
            assert 1 <= len(ref["sentences"]) <= 4
            with Image.open(root.path / IMAGES / image["file_name"]) as img:
                assert img.size == (image["width"], image["height"])


def test_expressions_are_cleaned_raw_ones(root: Root) -> None:
    raws = [line["raw"] for name in root.instances for _, line in root.sentences(name)]
    for name in root.instances:
        ids = [line["sent_id"] for _, line in root.sentences(name)]
        assert len(set(ids)) == len(ids)
        for _, line in root.sentences(name):
            assert sorted(line) == ["raw", "sent", "sent_id", "tokens"]
            assert line["sent"] == re.sub(r"[^a-z0-9 ]", "", line["raw"].lower())
            assert line["tokens"] == line["sent"].split()
            assert " ".join(line["tokens"]) == line["sent"]
    assert 0.05 < np.mean([raw != raw.lower() for raw in raws]) < 0.5
    assert 0.02 < np.mean([raw.endswith(".") for raw in raws]) < 0.5


def test_refcocog_expressions_are_longer(root: Root) -> None:
    words = {
        name: np.mean([len(line["tokens"]) for _, line in root.sentences(name)])
        for name in root.instances
    }
    assert words["refcocog"] > words["refcoco"] + 2 > words["refcoco+"]


def test_pickles_are_python_2s(root: Root) -> None:
    for name, split_by in PICKLES:
        data = (root.path / name / f"refs({split_by}).p").read_bytes()
        opcodes = list(pickletools.genops(data))
        assert (opcodes[0][0].name, opcodes[0][1]) == ("PROTO", 2)
        assert max(op.proto for op, _, _ in opcodes) == 2
        assert not {op.name for op, _, _ in opcodes} & {"BINUNICODE", "UNICODE", "GLOBAL"}
        assert isinstance(pickle.loads(data, encoding="bytes")[0][b"split"], bytes)


def test_splits_share_no_scene_and_agree_between_sets(root: Root) -> None:
    wanted = {"unc": {}, "umd": {"testA": "test", "testB": "test"}}
    wanted["google"] = {"testA": "val", "testB": "val"}
    for (_, split_by), refs in root.refs.items():
        for ref in refs:
            split = root.scenes[ref["image_id"]]["split"]
            assert ref["split"] == wanted[split_by].get(split, split)
    seen = {s["split"] for s in root.truth["scenes"]}
    assert seen == {"train", "val", "testA", "testB"}


def test_test_a_is_round_and_test_b_angular_and_training_has_all(root: Root) -> None:
    for name in ("refcoco", "refcoco+"):
        refs = root.refs[name, "unc"]
        shape = {c["id"]: c["name"] for c in root.instances[name]["categories"]}
        groups = {
            split: {SHAPES[shape[r["category_id"]]].group for r in refs if r["split"] == split}
            for split in ("testA", "testB")
        }
        assert groups == {"testA": {"round"}, "testB": {"angular"}}
        trained = {shape[r["category_id"]] for r in refs if r["split"] == "train"}
        assert trained == set(LEVELS[root.truth["settings"]["level"]].shapes)


PLACE_WORDS = set(
    re.findall(
        r"\w+",
        """left right top bottom middle center upper lower highest lowest leftmost rightmost topmost
        uppermost bottommost above below under over higher far furthest corner side near nearest
        closest next first second third fourth 2nd 3rd 4th last from""",
    )
)


def test_refcoco_plus_says_no_place(root: Root) -> None:
    words = {word for _, line in root.sentences("refcoco+") for word in line["tokens"]}
    assert not words & PLACE_WORDS
    assert {word for _, line in root.sentences("refcoco") for word in line["tokens"]} & PLACE_WORDS


def test_kinds_and_meanings_cover_every_expression(root: Root) -> None:
    level = root.truth["settings"]["level"]
    wanted = {"attribute", "location", "size", "relation"}
    if level != "easy":
        wanted |= {"texture", "ordinal", "negation"}
    for name in root.instances:
        kinds = json.loads((root.path / name / "kinds.json").read_text())
        ids = {str(line["sent_id"]) for _, line in root.sentences(name)}
        assert set(kinds) == ids == set(root.truth["meanings"][name])
        assert set(kinds.values()) <= wanted
        for _, line in root.sentences(name):
            kind = kinds[str(line["sent_id"])]
            assert (kind == "ordinal") == (" from " in f" {line['sent']} ")
            assert (kind == "negation") == bool({"not", "no", "without"} & set(line["tokens"]))
    assert set(json.loads((root.path / "refcoco" / "kinds.json").read_text()).values()) == wanted


# --- Images and masks ----------------------------------------------------------------------


def _decode(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """Number of polygons over each pixel."""
    rles = coco_mask.frPyObjects(polygons, height, width)
    counts: np.ndarray = coco_mask.decode(rles).sum(2)
    return counts


@pytest.mark.parametrize("name", list(LEVELS))
def test_polygons_are_the_visible_pixels(name: str) -> None:
    level, several = LEVELS[name], 0
    for seed in range(40):
        drawn = sample_scene(np.random.default_rng(seed), level, level.shapes)
        for index, thing in enumerate(drawn.scene.things):
            seen = drawn.owner == index
            count = _decode(thing.polygons, *seen.shape)
            iou = np.sum((count == 1) & seen) / np.sum((count > 0) | seen)
            assert iou > (0.95 if thing.area > 1500 else 0.9), (seed, thing.style)
            assert np.sum(count > 1) <= 0.002 * thing.area
            assert thing.area == seen.sum() <= thing.whole
            x, y, width, height = thing.box
            assert [width, height] == (np.ptp(np.argwhere(seen), axis=0)[::-1] + 1).tolist()
            assert seen[y : y + height, x : x + width].sum() == thing.area
            several += len(thing.polygons) > 1
    assert several == 0 if name == "easy" else several > 5


def test_outlines_of_awkward_masks_are_exact() -> None:
    rng = np.random.default_rng(0)
    masks = [ndimage.gaussian_filter(rng.normal(size=(40, 50)), s) > 0 for s in (0.7, 1, 2) * 8]
    ring = np.zeros((20, 20), bool)
    ring[3:17, 3:17] = True
    ring[8:12, 8:12] = False
    ring[5, 5] = ring[16, 16] = False
    for mask in [*masks, ring]:
        labels, _ = ndimage.label(mask)
        large = np.bincount(labels.ravel())[labels] >= 8
        count = _decode(visible_polygons(mask), *mask.shape)
        assert np.array_equal(count, (mask & large).astype(count.dtype))
    assert visible_polygons(np.zeros((5, 5), bool)) == []


def test_images_show_the_colours_of_the_ground_truth(root: Root) -> None:
    palette = np.array(list(COLOURS.values()), float)
    checked = 0
    for image in root.instances["refcoco"]["images"][:60]:
        pixels = np.array(Image.open(root.path / IMAGES / image["file_name"]), float)
        things = {o["ann_id"]: o for o in root.scenes[image["id"]]["objects"]}
        for ann in root.instances["refcoco"]["annotations"]:
            if ann["image_id"] != image["id"]:
                continue
            thing = things[ann["id"]]
            mask = _decode(ann["segmentation"], *pixels.shape[:2]) == 1
            inside = ndimage.binary_erosion(mask, iterations=2)
            if thing["texture"] == "plain" and inside.sum() > 50:
                shown = np.median(pixels[inside], axis=0)
                nearest = int(np.argmin(np.square(palette - shown).sum(1)))
                assert list(COLOURS)[nearest] == thing["colour"]
                checked += 1
    assert checked > 60


def test_sizes_shares_and_levels(root: Root) -> None:
    level = LEVELS[root.truth["settings"]["level"]]
    sizes = {(s["width"], s["height"]) for s in root.truth["scenes"]}
    aspects = [width / height for width, height in sizes]
    assert len(sizes) > 50
    assert min(aspects) < 0.8
    assert max(aspects) > 1.25
    assert level.side[0] <= min(map(max, sizes)) <= max(map(max, sizes)) <= level.side[1]
    counts = {len(s["objects"]) for s in root.truth["scenes"]}
    assert counts == set(range(level.count[0], level.count[1] + 1))
    areas = {o["ann_id"]: o for s in root.truth["scenes"] for o in s["objects"]}
    for name in root.instances:
        pixels = {i["id"]: i["width"] * i["height"] for i in root.instances[name]["images"]}
        for ann in root.instances[name]["annotations"]:
            assert ann["area"] == areas[ann["id"]]["area"] >= 0.4 * areas[ann["id"]]["whole"]
            share = ann["area"] / pixels[ann["image_id"]]
            least = max(0.01, level.area[0] * level.visible * 0.95)
            assert least <= share <= level.area[1] * 1.05


def test_words_matter(root: Root) -> None:
    """Most objects share a shape or colour with another object of their scene."""
    shared = [
        any(
            one is not o and (one["shape"] == o["shape"] or one["colour"] == o["colour"]) for o in s
        )
        for s in (scene["objects"] for scene in root.truth["scenes"])
        for one in s
    ]
    assert np.mean(shared) > 0.6


# --- BERT folder -----------------------------------------------------------------------------


def test_bert_folder_knows_every_word(root: Root) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root.path / "bert", local_files_only=True)
    assert tokenizer.pad_token_id == 0
    for name in root.instances:
        lines = [line for _, line in root.sentences(name)]
        raws = tokenizer([line["raw"] for line in lines])["input_ids"]
        assert not any(tokenizer.unk_token_id in ids for ids in raws)
        sents = tokenizer([line["sent"] for line in lines])["input_ids"]
        # One id a word, between [CLS] and [SEP], and back to the same words.
        assert [len(ids) - 2 for ids in sents] == [len(line["tokens"]) for line in lines]
        back = tokenizer.batch_decode(sents, skip_special_tokens=True)
        assert back == [line["sent"] for line in lines]
    other = tokenizer("Wooden chair, 3rd of 12!")["input_ids"]
    assert tokenizer.unk_token_id not in other


def test_bert_folder_makes_a_model(tmp_path: Path) -> None:
    generate(tmp_path / "r", scenes=1, val_scenes=0, test_scenes=0, text_width=192, text_layers=3)
    config = AutoConfig.from_pretrained(tmp_path / "r" / "bert", local_files_only=True)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("bert", 192, 3)
    words = (tmp_path / "r" / "bert" / "vocab.txt").read_text().split()
    assert words[0] == "[PAD]"
    assert len(words) == len(set(words)) == config.vocab_size
    model = AutoModel.from_config(config)
    assert model.embeddings.word_embeddings.weight.shape == (len(words), 192)


# --- Determinism and the command -------------------------------------------------------------


def _digests(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def test_same_seed_same_bytes_whatever_the_processes(tmp_path: Path) -> None:
    few: Json = {"scenes": 24, "val_scenes": 4, "test_scenes": 3}
    one = generate(tmp_path / "one", "medium", 5, **few)
    two = generate(tmp_path / "two", "medium", 5, **few, jobs=2)
    generate(tmp_path / "other", "medium", 6, **few)
    assert one == two
    digests = {name: _digests(tmp_path / name) for name in ("one", "two", "other")}
    assert digests["one"] == digests["two"]
    assert not any(name.startswith(".") for name in digests["one"])
    image_count = [name for name in digests["one"] if name.endswith(".jpg")]
    assert len(image_count) == 34
    assert all(digests["one"][name] != digests["other"][name] for name in image_count)


def test_more_training_scenes_leave_evaluation_alone(tmp_path: Path) -> None:
    def evaluation(scenes: int) -> list[str]:
        path = tmp_path / str(scenes)
        generate(path, scenes=scenes, val_scenes=3, test_scenes=2)
        names = sorted((path / IMAGES).iterdir())[scenes:]
        return [hashlib.sha256(name.read_bytes()).hexdigest() for name in names]

    assert evaluation(2) == evaluation(5)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--level", "simple"], "--level"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "one"], "--seed"),
        (["--scenes", "0"], "--scenes"),
        (["--val-scenes", "-2"], "--val-scenes"),
        (["--jobs", "0"], "--jobs"),
        (["--text-width", "100"], "--text-width"),
        (["--text-layers", "0"], "--text-layers"),
    ],
)
def test_bad_arguments_are_one_clear_line(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "new"), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert word in message
    assert message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_only_its_own_folder_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--scenes", "2", "--val-scenes", "1", "--test-scenes", "1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "refcoco").mkdir()
    assert main(["--out", str(tmp_path / "mine"), "--force", *few]) == 2
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["refcoco"]

    out = tmp_path / "out"
    assert main(["--out", str(out), *few]) == 0
    before = _digests(out)
    assert main(["--out", str(out), *few]) == 2
    assert "--force" in capsys.readouterr().err
    assert _digests(out) == before
    (out / "refshapes.json").unlink()  # as if it had been cut off
    (out / ".refshapes-unfinished").touch()
    assert main(["--out", str(out), "--force", *few]) == 0
    assert _digests(out) == before


def test_summary_counts_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--scenes", "12", "--val-scenes", "5", "--test-scenes", "4", "--level", "hard"]
    assert main(["--out", str(out), *arguments]) == 0
    header, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["set", "splitBy", "split", "refs", "sentences", "images"]
    assert len(lines) == 13
    root = Root(out)
    for name, split_by, split, *numbers in lines:
        refs = [r for r in root.refs[name, split_by] if r["split"] == split]
        sentences = sum(len(r["sentences"]) for r in refs)
        images = len({r["image_id"] for r in refs})
        assert [int(number) for number in numbers] == [len(refs), sentences, images]
