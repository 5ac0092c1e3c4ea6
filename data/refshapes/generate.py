"""RefShapes: generated images with referring expressions, written as a REFER data root.

    python -m data.refshapes --out DIR [--level easy|medium|hard] [--seed 0] [--scenes 4000]

A root holds `refcoco` (unc), `refcoco+` (unc: no expression says where its object is),
`refcocog` (umd and google: longer expressions), the images all three share, and

- `refshapes.json`: every scene's objects, referred to or not, and every expression's meaning;
- `<dataset>/kinds.json`: what each expression asks for most ("attribute", "location", …);
- `demo.json`: a few val images with expressions, for `demo_inference.py --list`;
- `bert/`: configuration and vocabulary of a small BERT, to train from scratch without a network.

A scene belongs to one of train, val, testA and testB, in all datasets: umd's test is testA and
testB, google's val is everything but train. As RefCOCO's testA refers to people and its testB to
all else, testA refers to round shapes (circle, heart, moon, ring, pair of dots) and testB to
angular ones. Both are named in training.
"""

import argparse
import json
import os
import shutil
import string
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import utils
from data.refshapes.drawing import SHAPES
from data.refshapes.expressions import MIX, Expression, describe, vocabulary
from data.refshapes.meanings import as_json, kind_of, meanings, uses_place
from data.refshapes.scenes import LEVELS, Scene, Thing, pick_weighted, sample_scene
from lib.errors import InputError

IMAGES = Path("images/mscoco/images/train2014")
SPLITS = ("train", "val", "testA", "testB")
CATEGORIES = {name: number for number, name in enumerate(SHAPES, 1)}
SMALLEST_TARGET = 0.01  # part of the image that must be visible of an object referred to
QUALITY = 92
DEMO_IMAGES = 4
FORMAT = 1

_UNFINISHED = ".refshapes-unfinished"
_OURS = (
    "images",
    "refcoco",
    "refcoco+",
    "refcocog",
    "bert",
    "demo.json",
    "refshapes.json",
    _UNFINISHED,
)


@dataclass(frozen=True)
class GeneratedDataset:
    """One of the written datasets.

    Attributes:
        folder: its folder.
        long: RefCOCOg's manner of speaking.
        places: whether expressions may say where things are.
        counts: chances of 1, 2, 3 and 4 expressions for an object.
        names: for each `refs(<splitBy>).p`, what each scene split is called there.
    """

    folder: str
    long: bool
    places: bool
    counts: tuple[float, float, float, float]
    names: dict[str, dict[str, str]]


_SAME = {split: split for split in SPLITS}
_UMD = {"train": "train", "val": "val", "testA": "test", "testB": "test"}
_GOOGLE = {"train": "train", "val": "val", "testA": "val", "testB": "val"}
DATASETS = (
    GeneratedDataset("refcoco", False, True, (0.1, 0.25, 0.5, 0.15), {"unc": _SAME}),
    GeneratedDataset("refcoco+", False, False, (0.1, 0.25, 0.5, 0.15), {"unc": _SAME}),
    GeneratedDataset(
        "refcocog", True, True, (0.2, 0.7, 0.1, 0.0), {"umd": _UMD, "google": _GOOGLE}
    ),
)


@dataclass(frozen=True)
class Task:
    """Everything a worker needs to make one scene; no scene depends on another."""

    out: Path
    level: str
    seed: int
    split: str
    index: int
    image_id: int


@dataclass(frozen=True)
class Made:
    """A finished scene: the expressions of each object, by dataset."""

    task: Task
    scene: Scene
    expressions: dict[str, dict[int, list[Expression]]]

    def ann_id(self, index: int) -> int:
        return self.task.image_id * 10 + index


def file_name(image_id: int) -> str:
    """Name of an image, as COCO's."""
    return f"COCO_train2014_{image_id:012d}.jpg"


def make(task: Task) -> Made:
    """Draw a scene, describe its objects, and save the image."""
    level = LEVELS[task.level]
    number = SPLITS.index(task.split)
    rng = np.random.default_rng([task.seed, level.number, number, task.index])
    group = {"testA": "round", "testB": "angular"}.get(task.split)
    lead = [name for name in level.shapes if group in (None, SHAPES[name].group)]
    if task.split == "train":
        lead = [lead[task.index % len(lead)]]  # so that no category is rare in training
    expressions: dict[str, dict[int, list[Expression]]] = {}
    while not any(expressions.values()):
        scene, pixels, _ = sample_scene(rng, level, lead)
        expressions = _describe_all(rng, task.level, scene, group)
    Image.fromarray(pixels).save(task.out / IMAGES / file_name(task.image_id), quality=QUALITY)
    return Made(task, scene, expressions)


def _describe_all(
    rng: np.random.Generator, level: str, scene: Scene, group: str | None
) -> dict[str, dict[int, list[Expression]]]:
    """Expressions by dataset and object; objects hardly visible or of the other group get none."""
    options = meanings(rng, scene, textures=LEVELS[level].textured > 0)
    targets = [
        index
        for index, thing in enumerate(scene.things)
        if thing.area >= SMALLEST_TARGET * scene.width * scene.height
        and group in (None, SHAPES[thing.style.shape].group)
    ]
    expressions: dict[str, dict[int, list[Expression]]] = {}
    for dataset in DATASETS:
        expressions[dataset.folder] = {}
        for index in targets:
            usable = [o for o in options[index] if dataset.places or not uses_place(o[0])]
            count = pick_weighted(rng, range(1, 5), dataset.counts)
            lines = describe(rng, scene, usable, MIX[level], count, dataset.long)
            if lines:
                expressions[dataset.folder][index] = lines
    return expressions


def generate(
    out: str | Path,
    level: str = "easy",
    seed: int = 0,
    scenes: int = 4000,
    val_scenes: int = 150,
    test_scenes: int = 100,
    jobs: int = 1,
    text_width: int = 128,
    text_layers: int = 2,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Write a RefShapes root. The same arguments give the same bytes, whatever `jobs` is.

    Args:
        out: folder to write; must be new, empty, or (with `force`) hold RefShapes.
        level: "easy", "medium" or "hard".
        seed: scenes of different seeds are unrelated; a scene depends on seed, level, split and
            its number only, so that more training scenes leave val and test as they are.
        scenes: number of training scenes.
        val_scenes: number of val scenes.
        test_scenes: number of scenes of testA, and again of testB.
        jobs: processes.
        text_width: hidden size of the written BERT configuration, a multiple of 64.
        text_layers: its number of layers.
        force: replace the RefShapes root in `out`.

    Returns:
        A row for each dataset, splitBy and split: refs, sentences and images.

    Raises:
        InputError: an argument is out of range, or `out` holds other files.
    """
    root = Path(out)
    _check(level, seed, (scenes, val_scenes, test_scenes), jobs, text_width, text_layers)
    _clear(root, force)
    counts = dict(zip(SPLITS, (scenes, val_scenes, test_scenes, test_scenes), strict=True))
    order = [(split, index) for split in SPLITS for index in range(counts[split])]
    tasks = [Task(root, level, seed, *place, number) for number, place in enumerate(order, 1)]
    made = list(tqdm(_run(tasks, jobs), total=len(tasks), unit="scene", disable=None))
    rows, meant = [], {}
    for dataset in DATASETS:
        meant[dataset.folder] = _write_dataset(root, dataset, made)
        rows += _summary(dataset, made)
    write_bert(root / "bert", text_width, text_layers)
    _write_json(root / "demo.json", _demo(made))
    settings = {"format": FORMAT, "level": level, "seed": seed, "scenes": counts}
    content = {"settings": settings, "scenes": [_scene_record(m) for m in made], "meanings": meant}
    _write_json(root / "refshapes.json", content)
    (root / _UNFINISHED).unlink()
    return rows


def _check(
    level: str, seed: int, scenes: Sequence[int], jobs: int, text_width: int, text_layers: int
) -> None:
    if level not in LEVELS:
        raise InputError(f"--level {level}: no such level; choose one of {', '.join(LEVELS)}")
    if seed < 0:
        raise InputError(f"--seed {seed}: must be 0 or more")
    if scenes[0] < 1 or min(scenes) < 0:
        raise InputError("--scenes must be 1 or more, --val-scenes and --test-scenes 0 or more")
    if sum(scenes) + scenes[-1] > 100_000_000:
        raise InputError(f"--scenes {scenes[0]}: more than 100 million scenes do not fit the ids")
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: must be 1 or more")
    if text_width < 64 or text_width % 64:
        raise InputError(f"--text-width {text_width}: must be a multiple of 64, the heads' width")
    if text_layers < 1:
        raise InputError(f"--text-layers {text_layers}: must be 1 or more")


def _clear(root: Path, force: bool) -> None:
    """Make an empty root with a mark that stays until everything is written."""
    if root.exists() and not root.is_dir():
        raise InputError(f"--out {root}: is a file; name a folder")
    present = {entry.name for entry in root.iterdir()} if root.exists() else set()
    if present & {"refshapes.json", _UNFINISHED}:
        if not force:
            raise InputError(f"--out {root}: holds RefShapes already; add --force to replace it")
        # The mark comes first: a root cut off while it is being replaced stays replaceable.
        (root / _UNFINISHED).touch()
        for name in present & set(_OURS) - {_UNFINISHED}:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif present:
        raise InputError(f"--out {root}: holds other files; name a new or empty folder")
    try:
        (root / IMAGES).mkdir(parents=True)
        (root / _UNFINISHED).touch()
    except OSError as error:
        raise InputError(f"--out {root}: cannot be written ({error.strerror})") from error


def _run(tasks: Sequence[Task], jobs: int) -> Iterator[Made]:
    if jobs == 1:
        yield from map(make, tasks)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(make, tasks, chunksize=16)


def _write_dataset(root: Path, dataset: GeneratedDataset, made: Sequence[Made]) -> dict[str, Any]:
    """Write a dataset's folder; return the meaning of each sent_id."""
    folder = root / dataset.folder
    folder.mkdir()
    refs: list[dict[str, Any]] = []
    meant: dict[str, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    for m in made:
        for index, lines in m.expressions[dataset.folder].items():
            first = len(kinds)
            refs.append(_ref(m, index, lines, len(refs), first))
            for sent_id, line in enumerate(lines, first):
                meant[str(sent_id)] = as_json(line.meaning)
                kinds[str(sent_id)] = kind_of(line.meaning)
    for split_by, names in dataset.names.items():
        renamed = [ref | {"split": names[ref["split"]]} for ref in refs]
        (folder / f"refs({split_by}).p").write_bytes(
            b"\x80\x02" + b"".join(_pickled(renamed)) + b"."
        )
    _write_json(folder / "instances.json", _instances(dataset, made))
    _write_json(folder / "kinds.json", kinds)
    return meant


def _ref(
    m: Made, index: int, lines: Sequence[Expression], ref_id: int, first: int
) -> dict[str, Any]:
    ann_id, image_id = m.ann_id(index), m.task.image_id
    sentences = [
        {"sent_id": sent_id, "raw": line.raw, "sent": line.sent, "tokens": line.sent.split()}
        for sent_id, line in enumerate(lines, first)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": CATEGORIES[m.scene.things[index].style.shape],
        "image_id": image_id,
        "file_name": file_name(image_id).replace(".jpg", f"_{ann_id}.jpg"),
        "split": m.task.split,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def _instances(dataset: GeneratedDataset, made: Iterable[Made]) -> dict[str, Any]:
    """COCO's tables, of what the dataset's refs use."""
    images, annotations = [], []
    for m in made:
        used = m.expressions[dataset.folder]
        if used:
            name, size = file_name(m.task.image_id), (m.scene.width, m.scene.height)
            image = {"id": m.task.image_id, "file_name": name, "width": size[0], "height": size[1]}
            images.append(image)
        annotations += [_annotation(m, index, m.scene.things[index]) for index in used]
    present = {annotation["category_id"] for annotation in annotations}
    categories = [
        {"id": number, "name": name, "supercategory": SHAPES[name].group}
        for name, number in CATEGORIES.items()
        if number in present
    ]
    info = {"description": f"RefShapes, {dataset.folder}", "version": str(FORMAT)}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _annotation(m: Made, index: int, thing: Thing) -> dict[str, Any]:
    return {
        "id": m.ann_id(index),
        "image_id": m.task.image_id,
        "category_id": CATEGORIES[thing.style.shape],
        "bbox": [float(value) for value in thing.box],
        "area": float(thing.area),
        "iscrowd": 0,
        "segmentation": thing.polygons,
    }


def _demo(made: Iterable[Made]) -> list[dict[str, Any]]:
    """Val images with an expression for each described object, for ``demo_inference.py --list``."""
    pairs: list[dict[str, Any]] = []
    for m in made:
        expressions = m.expressions["refcoco"]
        if m.task.split == "val" and len(expressions) > 1 and len(pairs) < DEMO_IMAGES:
            sentences = [lines[0].raw for lines in expressions.values()]
            name = f"{IMAGES}/{file_name(m.task.image_id)}"
            pairs.append({"image": name, "sentence": sentences})
    return pairs


def _scene_record(m: Made) -> dict[str, Any]:
    """A scene for `refshapes.json`: all its objects, from the bottom to the top."""
    objects = []
    for index, thing in enumerate(m.scene.things):
        plain = asdict(thing) | {
            "ann_id": m.ann_id(index),
            "z": index,
            "pieces": len(thing.polygons),
        }
        objects.append(plain.pop("style") | plain)
        del objects[-1]["polygons"]
    return {
        "image_id": m.task.image_id,
        "split": m.task.split,
        "width": m.scene.width,
        "height": m.scene.height,
        "gap": m.scene.gap,
        "objects": objects,
    }


def _pickled(value: object) -> Iterator[bytes]:
    """Opcodes of protocol 2 as Python 2 wrote them: its byte strings, which `pickle` cannot write.

    Readers have to decode them (`encoding="latin1"`), just as with the published files.
    """
    if isinstance(value, str):
        text = value.encode()
        short = len(text) < 256
        yield (b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text))) + text
    elif isinstance(value, int):
        yield b"J" + struct.pack("<i", value)
    elif isinstance(value, list):
        yield b"]("
        for item in value:
            yield from _pickled(item)
        yield b"e"
    elif isinstance(value, dict):
        yield b"}("
        for key, item in value.items():
            yield from _pickled(key)
            yield from _pickled(item)
        yield b"u"
    else:
        raise TypeError(f"no opcode for {type(value).__name__}")


def _write_json(path: Path, value: object) -> None:
    """Write under another name first: a file that exists is whole."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, separators=(",", ":")), encoding="utf-8")
    os.replace(partial, path)


def write_bert(folder: Path, width: int, layers: int) -> None:
    """Write configuration and vocabulary of a small uncased BERT that knows RefShapes' words.

    Any other English word comes out as pieces of one letter.

    Args:
        folder: made here.
        width: hidden size; heads are 64 wide.
        layers: number of layers.
    """
    folder.mkdir(parents=True)
    letters = string.ascii_lowercase + string.digits
    pieces = [*string.punctuation, *letters, *("##" + letter for letter in letters)]
    words = [word for word in vocabulary() if len(word) > 1]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *words]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(tokens),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    _write_json(folder / "config.json", config)
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}
    _write_json(folder / "tokenizer_config.json", tokenizer)


def _summary(dataset: GeneratedDataset, made: Iterable[Made]) -> list[dict[str, Any]]:
    refs, sentences, images = Counter[str](), Counter[str](), Counter[str]()
    for m in made:
        used = m.expressions[dataset.folder]
        refs[m.task.split] += len(used)
        sentences[m.task.split] += sum(map(len, used.values()))
        images[m.task.split] += bool(used)
    rows = []
    for split_by, names in dataset.names.items():
        for name in dict.fromkeys(names.values()):
            parts = [split for split in SPLITS if names[split] == name]
            totals = [sum(count[part] for part in parts) for count in (refs, sentences, images)]
            keys = ("set", "splitBy", "split", "refs", "sentences", "images")
            rows.append(dict(zip(keys, (dataset.folder, split_by, name, *totals), strict=True)))
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        names = [cell.ljust(w) for cell, w in zip(row[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(names + numbers))
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.Parser(
        prog="python -m data.refshapes", description="Generate referring data as a REFER root."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--level", default="easy", help="easy, medium or hard (default: easy)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=4000, help="training scenes (default: 4000)")
    parser.add_argument("--val_scenes", type=int, default=150, help="(default: 150)")
    parser.add_argument(
        "--test_scenes", type=int, default=100, help="of testA and of testB each (default: 100)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes; changes no byte")
    parser.add_argument("--text_width", type=int, default=128, help="hidden size in bert/")
    parser.add_argument("--text_layers", type=int, default=2, help="layers in bert/")
    parser.add_argument("--force", action="store_true", help="replace RefShapes in the folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        rows = generate(**vars(parse(argv)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    print(_table(rows))
    return 0
