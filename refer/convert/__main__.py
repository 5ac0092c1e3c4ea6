"""Convert data of one's own to a folder of the REFER layout, and check it.

    python -m refer.convert --input lines.jsonl --images DIR --out refer/data/mydata
    python -m refer.convert --input annotations.json --expressions e.csv --images DIR --out …
    python -m refer.convert --input LABELME_DIR --out …
    python -m refer.convert --input masks.csv --images DIR --masks DIR --out …
    python -m refer.convert --input PARQUET_DIR --out refer/data/refcoco

`train.py --dataset mydata` then uses it. docs/your_data.md describes each kind of input. Nothing is
written before everything has been read; a wrong line, image or mask is an error that names it.
"""

from __future__ import annotations

import filecmp
import json
import os
import pickle
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import utils
from lib.errors import InputError
from refer import check, pickles
from refer.convert import sources
from refer.convert.build import Converted, build
from refer.datasets import DATASETS
from refer.images import MAX_PIXELS

FORMATS = ("jsonl", "coco", "labelme", "masks", "parquet")


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Arguments of the command line, checked.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = utils.Parser("python -m refer.convert", description="Convert data to the REFER layout.")
    add = p.add_argument
    add("--input", type=Path, required=True, help="the file or folder to convert")
    add("--expressions", type=Path, help="of COCO annotations: CSV or JSON lines")
    add("--images", type=Path, help="folder of the images (default: the input's)")
    add("--masks", type=Path, help="folder of the masks (default: the input's, or the images')")
    add("--out", type=Path, required=True, metavar="ROOT/NAME", help="folder of the new dataset")
    add("--splitBy", default="unc", help="the file of references is refs(SPLITBY).p")
    add("--format", choices=FORMATS, help="of the input, where it is not recognized")
    add("--split_ratio", default="0.8,0.1,0.1", help="train,val,test, if no splits are given")
    add("--seed", type=int, default=0, help="of the division into splits")
    add("--exif", choices=("upright", "stored"), default="upright", help="how masks were drawn")
    add("--copy", action="store_true", help="copy the images, do not make hard links")
    add("--force", action="store_true", help="replace files of an earlier conversion")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="upper limit of an image's pixels")
    args = p.parse_args(argv)
    try:
        args.ratios = [float(part) for part in args.split_ratio.split(",")]
    except ValueError:
        args.ratios = []
    total = sum(args.ratios)
    if len(args.ratios) not in (2, 3) or min(args.ratios) < 0 or not 0.99 < total < 1.01:
        raise InputError(f"--split_ratio {args.split_ratio}: give three numbers of sum 1")
    args.ratios = [*args.ratios, 0.0][:3]
    if args.max_pixels < 1:
        raise InputError(f"--max_pixels {args.max_pixels}: must be 1 or more")
    for name in ("input", "expressions", "images", "masks"):
        path = getattr(args, name)
        if path and not path.exists():
            raise InputError(f"--{name} {path} does not exist")
        if path and name in ("images", "masks") and not path.is_dir():
            raise InputError(f"--{name} {path} is not a folder")
    if args.out.name in ("", "..") or "," in args.out.name:
        raise InputError(f"--out {args.out}: give the data root and a name, as refer/data/mydata")
    if not re.fullmatch(r"[\w.+-]+", args.splitBy):
        raise InputError(f"--splitBy {args.splitBy}: use letters, digits, . _ + -")
    args.format = args.format or detect(args.input, args.expressions)
    if (args.format == "coco") != bool(args.expressions):
        raise InputError("--expressions FILE goes with COCO annotations, which have none")
    if args.format != "parquet" and args.out.name in DATASETS:
        raise InputError(f"--out {args.out}: {args.out.name} is a published dataset; choose a name")
    for name in ("instances.json", f"refs({args.splitBy}).p"):
        if (args.out / name).exists() and not args.force:
            raise InputError(f"{args.out / name} exists: add --force to replace it")
    return args


def detect(path: Path, expressions: Path | None) -> str:
    """The kind of input, from the name of the file or what is in the folder.

    Raises:
        InputError: it is not recognized.
    """
    if expressions:
        return "coco"
    endings = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "masks", ".tsv": "masks"}
    endings[".parquet"] = "parquet"
    if path.is_dir():
        found = {endings.get(p.suffix.lower(), "") for p in path.iterdir()} & {"masks"}
        found |= {"parquet"} if any(path.rglob("*.parquet")) else set()
        if not found and any(path.rglob("*.json")):
            found = {"labelme"}
        if len(found) == 1:
            return found.pop()
    elif path.suffix.lower() in endings:
        return endings[path.suffix.lower()]
    elif path.suffix.lower() == ".json":
        content = sources.parse(sources.read_text(path), str(path))
        for key, kind in (("shapes", "labelme"), ("annotations", "coco")):
            if isinstance(content, dict) and key in content:
                return kind
    raise InputError(f"--input {path}: cannot tell what it is; give --format {'|'.join(FORMATS)}")


def convert(args: Namespace, scratch: Path) -> Converted:
    """Read the input; writes to the scratch folder only."""
    base = args.input if args.input.is_dir() else args.input.parent
    images = args.images or base
    if args.format == "parquet":
        from refer.convert.parquet import read_parquet

        paths = sorted(args.input.rglob("*.parquet")) if args.input.is_dir() else [args.input]
        refs, tables = read_parquet(paths)
        names = [image["file_name"] for image in tables["images"]]
        own = args.images and args.out.name not in DATASETS
        return Converted(refs, tables, {n: images / n for n in names} if own else {}, [])
    if args.format == "coco":
        items = sources.read_coco(args.input, args.expressions, args.max_pixels)
    elif args.format == "masks":
        items = sources.read_masks(args.input)
    else:
        read = sources.read_labelme if args.format == "labelme" else sources.read_jsonl
        items = list(read(args.input))
    if not items:
        raise InputError(f"--input {args.input} has no expressions")
    args.images, args.any_folder = images, bool(args.masks)
    args.masks = [args.masks] if args.masks else [base, images]
    return build(items, args, scratch)


def write(converted: Converted, args: Namespace, scratch: Path) -> None:
    """Write the dataset's folder: images first, so that a dataset that exists is complete.

    Args:
        converted: the dataset.
        args: of the command line.
        scratch: a folder on the same disk, where the records are written first and read again.

    Raises:
        InputError: another file has an image's name, or the records are not as they should be.
        OSError: something cannot be written.
    """
    files = scratch / f"refs({args.splitBy}).p", scratch / "instances.json"
    files[0].write_bytes(pickle.dumps(converted.refs, protocol=2))
    utils.write_text(json.dumps(converted.instances), files[1])
    try:
        pickles.read(files, args.max_pixels)
    except InputError as e:
        raise InputError(f"--input {args.input}: {e}".replace(f"{scratch}{os.sep}", "")) from None
    place_images(converted.files, args)
    args.out.mkdir(exist_ok=True)
    for file in reversed(files):
        os.replace(file, args.out / file.name)


def place_images(files: Mapping[str, Path], args: Namespace) -> None:
    """Link or copy images to the dataset's folder; those that are there already stay."""
    folder = args.out / "images"
    in_place = folder.exists() and args.images and folder.samefile(args.images)
    todo = {}
    for name, source in files.items():
        path = folder / name
        if not source.is_file():
            raise InputError(f"image {source} does not exist (--images)")
        if path.exists():
            if path.samefile(source) or filecmp.cmp(path, source, shallow=False):
                continue
            if in_place:
                what = "to be written upright (EXIF): put the originals in another folder"
                raise InputError(f"image {path} is {what}, named by --images")
            if not args.force:
                raise InputError(f"{path} exists and is another image: --force replaces it")
        todo[path] = os.path.realpath(source)
    for path, original in utils.progress(todo.items(), "writing images", 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            if args.copy:
                raise OSError
            os.link(original, partial)
        except OSError:  # another disk, or no such links
            shutil.copyfile(original, partial)
        os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says; exit with 1 if the check finds damage.

    Raises:
        InputError: the input is wrong, or files exist.
    """
    args = parse(argv)
    root = args.out.parent
    utils.make_folder(root)
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=root) as scratch:
            converted = convert(args, Path(scratch))
            write(converted, args, Path(scratch))
    except OSError as e:
        raise InputError(f"cannot write {args.out}: {e.strerror or e}") from e
    for remark in converted.remarks:
        print(remark)
    options = {"refer_data_root": root, "dataset": args.out.name, "splitBy": args.splitBy}
    options |= {"max_pixels": args.max_pixels}
    if args.images and not converted.files:
        options["image_root"] = args.images
    check.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


if __name__ == "__main__":
    utils.run_script(main)
