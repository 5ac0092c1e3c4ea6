"""What demo_inference.py is asked to do: flags, images, expressions, and the files to write."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from args import check_given, common_parser
from lib.errors import InputError
from lib.visualize import WRITABLE, printable

READABLE = (*WRITABLE, ".gif", ".ppm", ".avif", ".jp2", ".heic", ".heif")
MAX_LIST = 64 << 20  # bytes of --list


def parse_demo(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of demo_inference.py, to be completed by the checkpoint.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = common_parser("Segment the objects that expressions refer to, in images.", trained=True)
    p.prog = "demo_inference.py"
    add = p.add_argument_group("images and expressions").add_argument
    add("--image", default="", help="an image, or a folder of images")
    add("--sentence", nargs="+", default=[], help="one or more expressions, for every image")
    add(
        "--list",
        default="",
        metavar="JSON",
        help='instead of both: [{"image": PATH, "sentence": TEXT or [TEXT, ...]}, ...], '
        "paths relative to the file",
    )
    add("--output", default="./demo/", help="an image file for one overlay, otherwise a folder")
    add("--caption", action="store_true", help="write the expression below the overlay")
    add("--mask", action="store_true", help="also X.mask.png, 8 bits: 0 or 255")
    add("--rle", action="store_true", help="also X.rle.json, COCO's compressed RLE")
    add("--prob", action="store_true", help="also X.prob.png, 16 bits: probability x 65535")
    add(
        "--attention",
        action="store_true",
        help="also X.attention.png: each pixel's attention to each word, at every stage",
    )
    args = p.parse_args(argv)
    example = (
        'python demo_inference.py --image photo.jpg --sentence "the dog on the left" '
        "--resume ./checkpoints/refcoco.pth --output ./demo/"
    )
    if args.list and (args.image or args.sentence):
        raise InputError("--list names images and expressions: remove --image and --sentence")
    if not args.list and not args.image:
        raise InputError(f"--image is missing: give an image or a folder, like {example}")
    if not args.list and not args.sentence:
        raise InputError(f"--sentence is missing: give an expression, like {example}")
    if not args.resume:
        raise InputError(f"--resume is missing: give the trained checkpoint, like {example}")
    check_given(args)
    return args


@dataclass(frozen=True)
class Job:
    """An image, its expressions, and the overlay file of each expression."""

    image: Path
    expressions: tuple[str, ...]
    overlays: tuple[Path, ...]


def read_requests(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """Images and the expressions of each, from the command line or its list.

    Raises:
        InputError: no such image or folder, no image in the folder, or a malformed list.
    """
    if args.list:
        return _read_list(Path(args.list))
    source = Path(args.image)
    expressions = [_from_terminal(words) for words in args.sentence]
    if not source.is_dir():
        if not source.is_file():
            raise InputError(
                f"--image {source} does not exist: give an image or a folder of images"
            )
        return [(source, expressions)]
    if source.resolve() == Path(args.output).resolve():
        raise InputError(f"--output {source} is the images' own folder: give another")
    try:
        files = sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as e:
        raise InputError(f"--image {source} cannot be listed: {e.strerror}") from e
    images = [p for p in files if p.suffix.lower() in READABLE]
    if not images:
        raise InputError(f"no image in the folder {source} ({', '.join(READABLE)} are read)")
    return [(image, expressions) for image in images]


def _from_terminal(words: str) -> str:
    """Words of a command line, in UTF-8 even where the system's encoding is ASCII."""
    try:
        return os.fsencode(words).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not from a command line
        return words


def _read_list(path: Path) -> list[tuple[Path, list[str]]]:
    shape = '[{"image": "photo.jpg", "sentence": "the dog" or ["the dog", "the cat"]}, ...]'
    try:
        if path.stat().st_size > MAX_LIST:
            raise InputError(f"--list {path} has over {MAX_LIST >> 20} MB: split it")
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as e:
        raise InputError(f"--list {path} does not exist: give a JSON file like {shape}") from e
    except OSError as e:
        raise InputError(f"--list {path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"--list {path} is no JSON ({str(e)[:80]}): it takes {shape}") from e
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--list {path} has no list of entries: it takes {shape}")
    requests = []
    for number, entry in enumerate(entries, 1):
        request = _entry(entry)
        if request is None:
            raise InputError(f"--list {path}, entry {number} is not of the form {shape[1:-6]}")
        requests.append((path.parent / request[0], request[1]))
    return requests


def _entry(entry: Any) -> tuple[str, list[str]] | None:
    """Image and expressions of a list's entry; None if it is malformed."""
    if not isinstance(entry, dict):
        return None
    image, given = entry.get("image"), entry.get("sentence")
    expressions = [given] if isinstance(given, str) else given
    if not isinstance(image, str) or not image or "\0" in image:
        return None
    if image != image.encode("utf-8", "replace").decode():  # not a possible file name
        return None
    if not isinstance(expressions, list) or not expressions:
        return None
    return (image, expressions) if all(isinstance(e, str) for e in expressions) else None


def plan(requests: Iterable[tuple[Path, list[str]]], output: Path) -> list[Job]:
    """Name the overlays, before anything is computed.

    Args:
        requests: images and their expressions.
        output: a file for a single overlay, otherwise a folder, where an overlay is named
            after image and expression.

    Returns:
        A job for each request.

    Raises:
        InputError: an image would be overwritten, one file is given for several overlays, or
            the folder cannot be made.
    """
    requests = list(requests)
    to_file = bool(_image_ending(output)) and not output.is_dir()
    count = sum(len(expressions) for _, expressions in requests)
    if to_file and count > 1:
        raise InputError(f"--output {output} is one file for {count} overlays: give a folder")
    taken: set[str] = set()
    jobs = []
    for image, expressions in requests:
        paths = [
            output if to_file else output / _new_name(f"{_cut(image.stem, 100)}_{_slug(e)}", taken)
            for e in expressions
        ]
        jobs.append(Job(image, tuple(expressions), tuple(paths)))
    _protect(jobs)
    folder = output.parent if to_file else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output {output} cannot be made: {e.strerror}") from e
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {output}: no permission to write there")
    return jobs


def _image_ending(path: Path) -> str:
    """The ending of an image file, '' for anything else."""
    ending = path.suffix.lower()
    if ending in Image.registered_extensions() and ending not in WRITABLE:
        raise InputError(f"--output {path}: overlays are written as {', '.join(WRITABLE)}")
    return ending if ending in WRITABLE else ""


def _slug(expression: str) -> str:
    return _cut(re.sub(r"\W+", "-", printable(expression).lower()), 60).strip("-") or "sentence"


def _cut(text: str, size: int) -> str:
    """The first ``size`` bytes of a string: file systems count bytes."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


def _new_name(stem: str, taken: set[str]) -> str:
    """A name that no other overlay has, on file systems that ignore case, too."""
    name, number = stem, 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.lower())
    return os.fsdecode(f"{name}.png".encode("utf-8", "replace"))  # also where that is ASCII


def side_files(path: Path) -> dict[str, Path]:
    """The files of mask, RLE, probability map and attention, beside an overlay."""
    endings = {"mask": ".mask.png", "rle": ".rle.json", "prob": ".prob.png"}
    endings["attention"] = ".attention.png"
    return {kind: path.with_name(path.stem + ending) for kind, ending in endings.items()}


def _protect(jobs: Sequence[Job]) -> None:
    """Raise an error if an image would be overwritten."""
    images = {job.image.resolve() for job in jobs}
    for job in jobs:
        for path in job.overlays:
            if images & {p.resolve() for p in (path, *side_files(path).values())}:
                raise InputError(f"--output {path} would overwrite an image: give another")
