"""Images with expressions for a visitor's first click."""

from __future__ import annotations

import argparse
from pathlib import Path

from bert.tokenizer import Tokenizer
from data.refshapes.expressions import vocabulary
from data.refshapes.generate import IMAGES, Task, file_name, make
from lib.errors import InputError
from lib.predictor import open_upright
from tools.demo_jobs import read_requests

Example = tuple[Path, list[str]]  # an image and its expressions

SCENES, SEED = 4, 20_000  # of generated scenes; training uses other seeds
# Public-domain photos.
PHOTOS = Path(__file__).parents[2] / "tests/fixtures/refer_cc0/images/mscoco/images/train2014"
ABOUT = {
    "COCO_train2014_000000900001.jpg": ["woman in the orange suit", "black helmet"],
    "COCO_train2014_000000900002.jpg": ["right eye", "nose of the cat"],
    "COCO_train2014_000000900003.jpg": ["red cup of coffee", "silver spoon on the saucer"],
    "COCO_train2014_000000900004.jpg": ["white rocket in the middle", "leftmost tower"],
}


def choose_examples(
    given: str, tokenizer: Tokenizer, folder: Path, max_pixels: int
) -> list[Example]:
    """The page's examples.

    Args:
        given: a folder of images, or a list as of ``demo_inference.py --list``; '' for photos, or
            generated scenes where the model knows RefShapes' words alone.
        tokenizer: of the model.
        folder: where generated scenes are written.
        max_pixels: upper limit of an image's pixels.

    Raises:
        InputError: the given ones cannot be read.
    """
    if given:
        return _read(given, max_pixels)
    if knows_shapes_only(tokenizer):
        return draw_scenes(folder)
    return [(PHOTOS / name, lines) for name, lines in ABOUT.items() if (PHOTOS / name).is_file()]


def knows_shapes_only(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's words are those of RefShapes."""
    words = {word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 1}
    return words <= set(vocabulary())


def draw_scenes(folder: Path) -> list[Example]:
    """Write scenes of RefShapes' easy level, with an expression for each object."""
    (folder / IMAGES).mkdir(parents=True)
    examples = []
    for i in range(1, SCENES + 1):
        made = make(Task(folder, "easy", SEED, "val", i, i))
        lines = [of_object[0].sent for of_object in made.expressions["refcoco"].values()]
        examples.append((folder / IMAGES / file_name(i), lines))
    return examples


def _read(given: str, max_pixels: int) -> list[Example]:
    images = given if Path(given).is_dir() else ""
    request = argparse.Namespace(
        list="" if images else given, image=images, sentence=[], output="/dev/null"
    )
    try:
        examples = read_requests(request)
        for path, _ in examples:
            open_upright(path, max_pixels)
    except InputError as e:
        raise InputError(str(e).replace("--list ", "--examples ")) from e
    return examples
