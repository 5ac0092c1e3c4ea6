"""Download the files of datasets in REFER layout.

    python -m refer.download refcoco refcoco+ refcocog --root refer/data

Fetches the annotations and, one by one, the images that their references use; what is there is not
fetched again, and an interrupted command resumes when it is run again. Ends with what
`refer.check` finds. The exit code is 0 for sound data, 1 if something is missing or damaged, 2 if
a server or the disk stopped the command.
"""

from __future__ import annotations

import re
import sys
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

import utils
from lib.errors import InputError
from lib.weights import read_checkpoint
from refer import instances, pickles
from refer.check import CheckedREFER, as_text, examine
from refer.datasets import COCO_FOLDERS, dataset_info
from refer.fetch import Again, FetchError, Patience, Remote, digest_of, fetch, in_threads, unzip
from refer.images import open_rgb
from refer.names import parts_of
from refer.rare_images import misfit

ARCHIVE = "https://web.archive.org/web"
UNC = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"  # gone since 2022
COCO = "http://images.cocodataset.org"  # https has a certificate of another name
SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
MIRROR = "give another server with --mirror"
IMAGE_MIRROR = "give another server with --image_mirror"
MB = 1 << 20

# The zip and the splitBys of each dataset.
ANNOTATIONS = {
    "refcoco": (
        Remote(
            f"{ARCHIVE}/20220413011718id_/{UNC}/refcoco.zip",
            *(MIRROR, 512 * MB, 53_993_993),
            "sha256:7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
        ),
        ("unc", "google"),
    ),
    "refcoco+": (
        Remote(
            f"{ARCHIVE}/20220413011656id_/{UNC}/refcoco+.zip",
            *(MIRROR, 512 * MB, 45_613_210),
            "sha256:5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
        ),
        ("unc",),
    ),
    "refcocog": (
        Remote(
            f"{ARCHIVE}/20220413012904id_/{UNC}/refcocog.zip",
            *(MIRROR, 512 * MB, 56_712_951),
            "sha256:3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
        ),
        ("umd", "google"),
    ),
    "refclef": (
        Remote(f"{ARCHIVE}/20220413011817id_/{UNC}/refclef.zip", MIRROR, 512 * MB),
        ("unc", "berkeley"),
    ),
}
TRAIN2014 = Remote(
    f"{COCO}/zips/train2014.zip",
    *(IMAGE_MIRROR, 14_000 * MB, 13_510_573_713, "md5:0da8c0bd3d6becc4dcb32757491aca88"),
)
SAIAPR = Remote(
    f"{ARCHIVE}/20220515000000id_/{UNC.replace('https', 'http')}/images/saiapr_tc-12.zip",
    *(MIRROR, 8_000 * MB),
)
WEIGHTS = {
    "swin_base_w12_384_22k": Remote(
        f"{SWIN}/swin_base_patch4_window12_384_22k.pth", MIRROR, 2_000 * MB
    )
}
# Datasets that are not fetched, mostly for lack of a license: whose page has them, and the files.
BY_HAND = {
    "grefcoco": (
        "https://henghuiding.com/GREx",
        "grefcoco/grefs(unc).json and grefcoco/instances.json; the images are COCO's train2014",
    ),
    "ref-zom": (
        "https://github.com/toggle1995/RIS-DMMI",
        "ref-zom/refs(final).p (there Ref-ZOM(final).p) and ref-zom/instances.json; COCO's "
        "train2014 and val2014 together in images/trainval2014/",
    ),
    "rrsisd": (
        "https://github.com/Lsan2401/RMSIN",
        "rrsisd/refs(unc).p and rrsisd/instances.json; images in images/rrsisd/JPEGImages/",
    ),
    "refsegrs": (
        "https://huggingface.co/datasets/JessicaYuan/RefSegRS",
        "refsegrs/images/NAME.tif, refsegrs/masks/NAME.tif and "
        "refsegrs/output_phrase_{train,val,test}.txt",
    ),
    "risbench": (
        "https://github.com/HIT-SIRS/CroBIM",
        "risbench/ with the files as in refsegrs",
    ),
    "refcoco-m": (
        "https://huggingface.co/datasets/moondream/refcoco-m",
        "refcoco-m/*.parquet; images from the files by python -m refer.refcoco_m, or COCO's",
    ),
}
COCO_NAME = re.compile(r"COCO_((?:train|val)2014)_\d{12}\.jpg")
IMAGE_LIMIT = 32 * MB  # COCO's images have up to 1 MB
HOPELESS = 16  # images in a row that failed, after which the server is taken to be down

Needed = dict[Path, tuple[str, int, int]]  # name, width and height of the image of a file


def mirrored(remote: Remote, mirror: str | None, skip_checksum: bool) -> Remote:
    """The same file from a mirror, with or without its size and checksum."""
    if mirror is not None:
        remote = replace(remote, url=f"{mirror}/{remote.name}")
    return replace(remote, size=None, digest="") if skip_checksum else remote


def get_archive(remote: Remote, folder: Path, patience: Patience) -> Path:
    """Fetch a zip; one that is in the folder already is used if its checksum is right."""
    path = folder / remote.name
    if not path.is_file():
        size = f", {remote.size / 1e6:,.0f} MB" if remote.size else ""
        print(f"fetching {remote.url}{size}", flush=True)
        fetch(remote, path, patience, partial(_check_zip, remote.url), show=True)
    elif remote.digest and digest_of(path, remote.digest) != remote.digest:
        raise InputError(
            f"{path} has another checksum than {remote.digest}: remove it to fetch it again, or "
            "accept it with --skip_checksum"
        )
    return path


def _remove(archive: Path) -> None:
    """Remove an unpacked zip, and its folder if that is empty then."""
    archive.unlink()
    with suppress(OSError):
        archive.parent.rmdir()


def _check_zip(url: str, path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise FetchError(f"{url}: what came is no zip archive, and is removed; {MIRROR}")


def get_annotations(args: Namespace, dataset: str, patience: Patience) -> list[str]:
    """Fetch a dataset's annotations unless they are there; return the splitBys that are."""
    remote, split_bys = ANNOTATIONS[dataset]
    folder = args.root / dataset
    refs = {f"refs({split_by}).p": split_by for split_by in split_bys}

    def there() -> list[str]:
        return [split_by for name, split_by in refs.items() if (folder / name).is_file()]

    def target(names: Sequence[str], member: str) -> Path | None:
        parts = parts_of(member)
        path = folder / parts[-1] if parts else folder
        wanted = parts[-2:-1] == [dataset] and parts[-1] in names
        return path if wanted and not path.is_file() else None

    if not (folder / "instances.json").is_file() or not there():
        utils.make_folder(folder)
        remote = mirrored(remote, args.mirror, args.skip_checksum)
        archive = get_archive(remote, args.root / "downloads", patience)
        # instances.json is the last: where it is, the others are.
        for names, most in (
            (list(refs), pickles.MAX_BYTES),
            (["instances.json"], instances.MAX_BYTES),
        ):
            unzip(archive, partial(target, names), most, 2 * most)
        if not (folder / "instances.json").is_file() or not there():
            files = " and ".join([*refs, "instances.json"])
            raise InputError(f"{archive} does not have {files} in a folder {dataset}: remove it")
        _remove(archive)
    return there()


def needed_images(args: Namespace, dataset: str, split_bys: Sequence[str]) -> Needed:
    """The images of all references, by the file where each is or has to be."""
    needed: Needed = {}
    for split_by in split_bys:
        refer = CheckedREFER(args.root, dataset, split_by, args.image_root)
        for image_id in {ref["image_id"] for ref in refer.sound}:
            record = refer.Imgs[image_id]
            name = (parts_of(record["file_name"]) or [""])[-1]
            needed[refer.image_path(image_id)] = (name, record["width"], record["height"])
    return needed


def is_there(path: Path, width: int, height: int) -> bool:
    """Whether a file is an image of this shape, by its header.

    Raises:
        FetchError: it is another image.
    """
    try:
        with Image.open(path) as image:
            reason = misfit(image, width, height)
    except Exception:  # PIL raises nearly anything for a damaged file
        return False
    if reason:
        raise FetchError(f"image {path} {reason}; remove it to fetch it again")
    return True


def get_image(
    item: tuple[Path, tuple[str, int, int]], host: str, patience: Patience
) -> FetchError | None:
    """Fetch one image, decode it and compare its size with the record; return what failed."""
    path, (name, width, height) = item
    try:
        coco = COCO_NAME.fullmatch(name)
        if coco is None:
            raise FetchError(f"{path}: no image of COCO 2014 has this name; put it there yourself")
        remote = Remote(f"{host}/{coco[1]}/{name}", IMAGE_MIRROR, IMAGE_LIMIT)

        def check(file: Path) -> None:
            try:
                image = open_rgb(file)
            except InputError as error:
                raise Again(error) from None
            if image.size != (width, height):
                size = "has {}x{} pixels instead of {}x{}".format(*image.size, width, height)
                raise FetchError(f"{remote.url}: the image {size}; {IMAGE_MIRROR}")

        fetch(remote, path, patience, check)
    except FetchError as error:
        return error
    return None


def get_images(args: Namespace, needed: Needed, dataset: str, patience: Patience) -> None:
    """Fetch the images that are missing; print those that the server does not give.

    Raises:
        InputError: the server seems to be down, or the disk is full.
    """
    failed: list[FetchError] = []
    missing: Needed = {}
    for path, facts in utils.progress(needed.items(), "images", 0, len(needed)):
        try:
            if not is_there(path, *facts[1:]):
                missing[path] = facts
        except FetchError as error:
            failed.append(error)
    print(f"{dataset}: {len(missing):,} of {len(needed):,} images are missing", flush=True)
    coco = dataset_info(dataset).image_folders == COCO_FOLDERS
    if args.images == "all" or not coco:
        get_image_archive(args, needed, missing, coco, patience)
        missing = {}
    in_a_row = 0
    work = partial(get_image, host=args.image_mirror or COCO, patience=patience)
    results = in_threads(work, list(missing.items()), args.connections)
    for failure in utils.progress(results, "images", 0, len(missing)):
        in_a_row = in_a_row + 1 if failure else 0
        if failure:
            failed.append(failure)
        if in_a_row >= HOPELESS:
            raise InputError(f"{in_a_row} images failed one after the other; {failure}")
    for failure in failed[:3]:
        print(f"not fetched: {failure}", flush=True)
    if failed:
        print(f"{len(failed):,} of {len(needed):,} images were not fetched", flush=True)


def get_image_archive(
    args: Namespace, needed: Needed, missing: Needed, coco: bool, patience: Patience
) -> None:
    """Fetch the zip with all images, if one is missing, and unpack those that are not there."""
    by_name = {facts[0]: path for path, facts in needed.items()}

    def target(member: str) -> Path | None:
        name = (parts_of(member) or [""])[-1]
        if name in by_name:
            return by_name[name] if by_name[name] in missing else None
        path = next(iter(needed)).parent / name
        return path if COCO_NAME.fullmatch(name) and not path.is_file() else None

    remote = mirrored(SAIAPR, args.mirror, args.skip_checksum)
    if coco:
        mirror = args.image_mirror and f"{args.image_mirror}/zips"
        remote = mirrored(TRAIN2014, mirror, args.skip_checksum)
    folder = args.root / "downloads"
    if needed and (missing or (folder / remote.name).is_file()):
        archive = get_archive(remote, folder, patience)
        written = unzip(archive, target, IMAGE_LIMIT, 2 * archive.stat().st_size + IMAGE_LIMIT)
        print(f"{archive}: {len(written):,} images unpacked", flush=True)
        _remove(archive)


def download(args: Namespace, dataset: str, patience: Patience) -> bool:
    """Fetch what is missing of a dataset, check it, and return whether it is sound."""
    split_bys = get_annotations(args, dataset, patience)
    if args.images != "none":
        needed = needed_images(args, dataset, split_bys)
        get_images(args, needed, dataset, patience)
    sound = True
    for split_by in split_bys:
        refer = CheckedREFER(args.root, dataset, split_by, args.image_root)
        report = examine(refer, decode=args.images != "none")
        print(as_text(report), end="\n\n", flush=True)
        ignored = "missing_picture" if args.images == "none" else ""
        sound &= not any(c.damage and c.found and c.name != ignored for c in report.checks)
    return sound


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Arguments of the command line, checked.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = utils.Parser(
        "python -m refer.download", description="Download the files of datasets in REFER layout."
    )
    names = ", ".join([*ANNOTATIONS, *BY_HAND])
    p.add_argument("datasets", nargs="*", metavar="DATASET", help=names)
    p.add_argument("--root", type=Path, default=Path("refer/data"), help="REFER data root")
    p.add_argument("--image_root", default=None, help="folder of the images, if elsewhere")
    p.add_argument(
        "--images",
        choices=("needed", "all", "none"),
        default="needed",
        help="those of the references one by one, the zip of all, or none",
    )
    p.add_argument("--weights", choices=tuple(WEIGHTS), default=None, help="ImageNet weights")
    p.add_argument("--mirror", default=None, metavar="URL", help="URL/refcoco.zip is fetched")
    p.add_argument(
        "--image_mirror",
        default=None,
        metavar="URL",
        help="URL/train2014/COCO_….jpg or URL/zips/train2014.zip is fetched",
    )
    p.add_argument("--skip_checksum", action="store_true", help="accept other copies of archives")
    p.add_argument("--connections", type=int, default=8, help="images fetched at a time, up to 32")
    args = p.parse_args(argv)
    unknown = [name for name in args.datasets if name not in {*ANNOTATIONS, *BY_HAND}]
    if unknown or not (args.datasets or args.weights):
        what = f"no dataset is named '{unknown[0]}'" if unknown else "nothing to download"
        raise InputError(f"{what}: give {names}, or --weights {', '.join(WEIGHTS)}")
    if not 1 <= args.connections <= 32:
        raise InputError(f"--connections {args.connections}: must be 1 to 32")
    if args.image_root and not Path(args.image_root).is_dir():
        raise InputError(f"image folder {args.image_root} does not exist (--image_root): make it")
    for flag in ("mirror", "image_mirror"):
        url = getattr(args, flag)
        if url is not None and (urlsplit(url).scheme not in ("http", "https") or "//" not in url):
            raise InputError(f"--{flag} {url}: give an address such as https://host/folder")
        setattr(args, flag, url and url.rstrip("/"))
    return args


def main(argv: Sequence[str] | None = None, patience: Patience | None = None) -> None:
    """Download what the command line names; exit with 1 if something is missing or damaged.

    Raises:
        InputError: a server does not give a file, or the disk is full.
    """
    args = parse(argv)
    patience = patience or Patience()
    sound = True
    if args.weights:
        get_weights(args, patience)
    for dataset in dict.fromkeys(args.datasets):
        if dataset in BY_HAND:
            page, files = BY_HAND[dataset]
            there = (args.root / dataset).is_dir()
            print(f"{dataset} may not be passed on: get it from {page}")
            print(f"It belongs in {args.root}{' (a folder is there)' if there else ''}: {files}.")
            sound &= there
        else:
            sound &= download(args, dataset, patience)
    if not sound:
        sys.exit(1)


def get_weights(args: Namespace, patience: Patience) -> None:
    """Fetch weights into pretrained_weights/ unless they are there."""
    remote = mirrored(WEIGHTS[args.weights], args.mirror, args.skip_checksum)
    path = Path("pretrained_weights") / remote.name

    def check(file: Path) -> None:
        try:
            read_checkpoint(file)
        except InputError as error:
            raise FetchError(f"{remote.url}: no weights ({error}); {MIRROR}") from None

    if not path.is_file():
        print(f"fetching {remote.url}", flush=True)
        fetch(remote, path, patience, check, show=True)
    print(f"weights: {path}")


if __name__ == "__main__":
    utils.run_script(main)
