"""Check the files of a dataset in REFER layout.

    python -m refer.check --refer_data_root refer/data --dataset refcoco --splitBy unc --images

Damage is what would stop training or spoil its data; notes are facts about sound data. The exit
code is 0 for sound data, 1 for damaged, 2 if a file cannot be read at all. Counts other than the
published ones are no damage: a subset or a dataset of one's own is sound.
"""

from __future__ import annotations

import os.path
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

import utils
from bert.tokenizer import Tokenizer, encode, load_tokenizer
from lib.errors import InputError
from refer.datasets import UNVERIFIED, Counts, published_counts
from refer.images import MAX_PIXELS, open_rgb
from refer.instances import Record
from refer.masks import MAX_POLYGON
from refer.pickles import Ref
from refer.rare_images import misfit
from refer.refer import REFER, in_split

OUTSIDE = 1.0  # pixels by which a corner may leave the image; drawing clips it
EXAMPLES = 3  # printed per check; the JSON file has all
MAX_SPLITS = 20  # counted by name; the others only in 'all'
THREADS = 8  # that decode images


@dataclass(frozen=True)
class Split:
    """A split's counts beside the published ones, if there are any."""

    name: str
    found: Counts
    published: Counts | None = None
    verified: bool = True

    @property
    def as_published(self) -> bool | None:
        """Whether all counts are as published; None if none are published."""
        if self.published is None:
            return None
        sentences = self.published.sentences if self.verified else None
        pairs = (
            (self.published.refs, self.found.refs),
            (self.published.images, self.found.images),
            (sentences, self.found.sentences),
        )
        return all(known in (None, found) for known, found in pairs)


@dataclass(frozen=True)
class Check:
    """The findings of one check.

    Attributes:
        name: its key in the JSON file.
        title: of the findings.
        damage: whether findings make the data unsound.
        looked_at: number of things checked.
        found: a line for each finding.
        remark: about all findings.
    """

    name: str
    title: str
    damage: bool
    looked_at: int
    found: Sequence[str]
    remark: str = ""

    @property
    def verdict(self) -> str:
        """ok, note or DAMAGE."""
        if not self.found:
            return "ok"
        return "DAMAGE" if self.damage else "note"


@dataclass(frozen=True)
class Report:
    """The findings of all checks of a dataset."""

    dataset: str
    split_by: str
    folder: str
    image_folder: str
    splits: list[Split]
    checks: list[Check]

    @property
    def sound(self) -> bool:
        """Whether no check found damage."""
        return not any(check.damage and check.found for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "dataset": self.dataset,
            "splitBy": self.split_by,
            "folder": self.folder,
            "image_folder": self.image_folder,
            "sound": self.sound,
            "splits": [asdict(s) | {"as_published": s.as_published} for s in self.splits],
            "checks": [
                asdict(c) | {"verdict": c.verdict.lower(), "count": len(c.found)}
                for c in self.checks
            ],
        }


class CheckedREFER(REFER):
    """A dataset; the references that `REFER` raises errors for become findings.

    Attributes:
        sound: the references with an annotation and an image, each ref_id once; the methods
            of `REFER` know only these. `data['refs']` still has all.
        index_checks: the checks of ids.
    """

    sound: list[Ref]
    index_checks: list[Check]

    def _index_instances(self, path: Path) -> None:
        self.index_checks = []
        for table in ("image", "annotation"):
            records: list[Record] = self.data[table + "s"]
            first, again = _repeats(records, "id")
            # The same record twice does no harm.
            found = [f"{table} {r['id']}" for r in again if r != first[r["id"]]]
            self.data[table + "s"] = list(first.values())
            self._add(f"repeated_{table}_id", f"ids of two different {table}s", len(records), found)
        super()._index_instances(path)

    def _index_refs(self, refs: list[Ref], path: Path) -> None:
        first, again = _repeats(refs, "ref_id")
        unannotated = [r for r in first.values() if not self.Anns.keys() >= set(r["ann_ids"])]
        without_image = [ref for ref in first.values() if ref["image_id"] not in self.Imgs]
        unusable = {ref["ref_id"] for ref in unannotated + without_image}
        self.sound = [ref for ref in first.values() if ref["ref_id"] not in unusable]
        super()._index_refs(self.sound, path)
        in_other_image = [
            r
            for r in self.sound
            if {ann["image_id"] for ann in self.refToAnns[r["ref_id"]]} - {r["image_id"]}
        ]
        sent_ids = Counter(s["sent_id"] for ref in first.values() for s in ref["sentences"])
        for name, title, found in (
            ("repeated_ref_id", "references with the id of an earlier one", _names(again)),
            (
                "no_annotation",
                "references without their annotation",
                _names(unannotated, "ann_ids"),
            ),
            ("no_image_record", "references to unlisted images", _names(without_image, "image_id")),
            ("other_image", "annotations of another image", _names(in_other_image, "ann_ids")),
        ):
            self._add(name, title, len(refs), found)
        found = [f"sentence {sent_id}, {n} times" for sent_id, n in sent_ids.items() if n > 1]
        self._add("repeated_sent_id", "sentence ids in use twice", sent_ids.total(), found)

    def _add(self, name: str, title: str, looked_at: int, found: list[str]) -> None:
        self.index_checks.append(Check(name, title, True, looked_at, found))


def _repeats(records: Iterable[Record], key: str) -> tuple[dict[int, Record], list[Record]]:
    """The first record of each id, and all later ones."""
    first: dict[int, Record] = {}
    later = [record for record in records if first.setdefault(record[key], record) is not record]
    return first, later


def _names(refs: Iterable[Ref], key: str = "") -> list[str]:
    what = {"ann_ids": ", annotation ", "image_id": ", image "}.get(key, "")
    return [f"reference {ref['ref_id']}{what}{_value(ref, key)}" for ref in refs]


def _value(ref: Ref, key: str) -> str:
    value = ref.get(key, "")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def examine(
    refer: CheckedREFER,
    *,
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 20,
    decode: bool = False,
) -> Report:
    """Check a dataset.

    Args:
        refer: the dataset.
        tokenizer: counts the tokens of expressions; None counts words.
        max_tokens: upper limit of the model, [CLS] and [SEP] included.
        decode: open every image, too.

    Returns:
        The findings. No file is changed.
    """
    checks = [
        *refer.index_checks,
        *_check_objects(refer),
        *_check_expressions(refer.data["refs"], tokenizer, max_tokens),
        _check_shared_images(refer.data["refs"]),
        *_check_images(refer, decode),
    ]
    return Report(
        dataset=refer.dataset,
        split_by=refer.splitBy,
        folder=str(refer.DATA_DIR),
        image_folder=str(refer.IMAGE_DIR),
        splits=_count(refer),
        checks=sorted(checks, key=lambda check: not check.damage),
    )


def _count(refer: REFER) -> list[Split]:
    """Counts of the published and the existing splits, and of all references together."""
    by_label: dict[str, list[Ref]] = {}
    for ref in refer.data["refs"]:
        by_label.setdefault(ref["split"], []).append(ref)
    published = published_counts(refer.dataset, refer.splitBy)
    names = dict.fromkeys([*published, *refer.splits()])
    names.pop("all", None)
    rows = []
    for name in [*list(names)[:MAX_SPLITS], "all"]:
        labels = [label for label in by_label if name == "all" or in_split(label, name)]
        refs = [ref for label in labels for ref in by_label[label]]
        found = Counts(
            len(refs),
            sum(len(ref["sentences"]) for ref in refs),
            len({ref["image_id"] for ref in refs}),
        )
        verified = (refer.dataset, refer.splitBy, name) not in UNVERIFIED
        rows.append(Split(name, found, published.get(name), verified))
    return rows


def _check_objects(refer: CheckedREFER) -> list[Check]:
    """Draw every annotation of every reference."""
    damaged: list[str] = []
    outside: list[str] = []
    empty: list[str] = []
    overlapping: list[str] = []
    count = total = lost = 0
    union = refer.info.mask_mode == "union"  # pixels in several polygons belong to the object
    for ref in utils.progress(refer.sound, "objects", rank=0):
        image = refer.Imgs[ref["image_id"]]
        size = image["height"], image["width"]
        for annotation in refer.refToAnns[ref["ref_id"]]:
            count += 1
            where = f"annotation {annotation['id']} of reference {ref['ref_id']}"
            segmentation = annotation.get("segmentation")
            polygons = polygons_of(segmentation)
            beyond = overshoot(polygons, image["width"], image["height"])
            try:
                inside = polygons if beyond <= OUTSIDE else []
                name = f"{refer!r}: {where}"
                pixels, twice = _count_pixels(refer, segmentation, *size, inside, name)
            except InputError as error:
                damaged.append(str(error))
                continue
            if beyond > OUTSIDE:
                outside.append(f"{where}: by {beyond:.0f} pixels")
            if pixels == (0 if union else twice):
                empty.append(where + (": its polygons cover each other" if twice else ""))
            elif twice:
                overlapping.append(f"{where}: {twice} of {pixels} pixels")
            total, lost = total + pixels, lost + twice
    lost_as = "belong to several polygons" if union else "count as background"
    remark = f"{lost} of {total} pixels {lost_as}" if lost else ""
    without = [ref for ref in refer.sound if not ref["ann_ids"]]
    references = len(refer.sound)
    return [
        Check("bad_outline", "objects that cannot be drawn", True, count, damaged),
        Check("outside", "objects that leave their image", True, count, outside),
        # Where samples may have no target, an object may have nothing to draw either (a crowd).
        Check(
            "empty_mask", "objects without a pixel", refer.info.metrics == "standard", count, empty
        ),
        Check("overlap", "objects of overlapping polygons", False, count, overlapping, remark),
        Check("no_target", "references without an object", False, references, _names(without)),
    ]


FloatArray = npt.NDArray[np.float64]


def polygons_of(segmentation: Any) -> list[FloatArray]:
    """Each polygon's x0, y0, x1, y1, …; [] for run lengths and anything odd."""
    if not isinstance(segmentation, list):
        return []
    try:
        polygons = [np.asarray(points, np.float64) for points in segmentation]
    except (TypeError, ValueError, OverflowError):
        return []
    plain = all(p.ndim == 1 and p.size >= 6 and p.size % 2 == 0 for p in polygons)
    return polygons if plain else []


def overshoot(polygons: Sequence[FloatArray], width: int, height: int) -> float:
    """By how many pixels the farthest corner lies outside the image; nan if one is nan."""
    sides = [(-p.min(), p[::2].max() - width, p[1::2].max() - height) for p in polygons]
    return float(np.max(sides, initial=0.0))


def _count_pixels(
    refer: REFER,
    segmentation: Any,
    height: int,
    width: int,
    polygons: Sequence[FloatArray],
    where: str,
) -> tuple[int, int]:
    """Count an object's pixels, and those that several of its components cover.

    Args:
        refer: the dataset, which draws.
        segmentation: of the object.
        height, width: of the image.
        polygons: the object's, all inside the image; [] to draw the object.
        where: its name, for error messages.

    Raises:
        InputError: the object cannot be drawn.
    """
    if polygons and sum(p.size for p in polygons) * (height + width) <= MAX_POLYGON:
        # 16 times faster than drawing.
        runs = coco_mask.frPyObjects([p.tolist() for p in polygons], height, width)
        pixels = int(coco_mask.area(coco_mask.merge(runs)))
        twice = int(coco_mask.area(runs).sum()) - pixels
        if len(runs) < 3 or not twice:  # with three, a pixel may be counted three times
            return pixels, twice
    mask = refer.draw(segmentation, height, width, where)
    return int(np.count_nonzero(mask)), int(np.count_nonzero(mask > 1))


def _check_expressions(
    refs: Sequence[Ref], tokenizer: Tokenizer | None, max_tokens: int
) -> list[Check]:
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    texts: list[str] = [sentence["raw"] for sentence in sentences]
    if tokenizer is None:
        over = [len(text.split()) + 2 > max_tokens for text in texts]
        remark = "at least: only words were counted; give --bert_tokenizer"
    else:
        over = (encode(tokenizer, texts, max_tokens + 1)[1][:, -1] == 1).tolist()
        remark = "they are cut"
    too_long = [
        f"sentence {sentence['sent_id']}: {sentence['raw']}"
        for sentence, is_over in zip(sentences, over, strict=True)
        if is_over
    ]
    empty = [f"sentence {s['sent_id']}" for s in sentences if not s["raw"].strip()]
    wordless = [ref for ref in refs if not ref["sentences"]]
    title = f"expressions over {max_tokens} tokens"
    return [
        Check("empty_expression", "empty expressions", True, len(texts), empty),
        Check("no_expression", "references without expression", False, len(refs), _names(wordless)),
        Check("long_expression", title, False, len(texts), too_long, remark if too_long else ""),
    ]


def _check_shared_images(refs: Iterable[Ref]) -> Check:
    labels: dict[int, set[str]] = {}
    for ref in refs:
        labels.setdefault(ref["image_id"], set()).add(ref["split"])
    shared = {image: ", ".join(sorted(names)) for image, names in labels.items() if len(names) > 1}
    common = Counter(shared.values()).most_common(EXAMPLES)
    remark = "; ".join(f"{names}: {count}" for names, count in common)
    found = [f"image {image}: {names}" for image, names in shared.items()]
    return Check("shared_image", "images in several splits", False, len(labels), found, remark)


def _check_images(refer: CheckedREFER, decode: bool) -> list[Check]:
    """Look for the images of all references; open them only if `decode`."""
    missing: list[str] = []
    present: list[int] = []
    image_ids = dict.fromkeys(ref["image_id"] for ref in refer.sound)
    for image_id in utils.progress(image_ids, "files", rank=0):
        try:
            path = refer.image_path(image_id)
        except InputError as error:
            missing.append(str(error))
            continue
        if os.path.isfile(path):
            present.append(image_id)
        else:
            missing.append(str(path))
    count = len(image_ids)
    no_folder = missing and not os.path.isdir(refer.IMAGE_DIR)
    remark = refer.missing_image(refer.IMAGE_DIR) if no_folder else ""
    checks = [Check("missing_picture", "images that are missing", True, count, missing, remark)]
    if decode:
        unreadable, others, resized = _decode(refer, present)
        copies = "resized copies, which are used; masks have the size on record" if resized else ""
        checks += [
            Check("bad_picture", "images that cannot be read", True, len(present), unreadable),
            Check("picture_shape", "images of another shape", True, len(present), others),
            Check("picture_size", "images of another size", False, len(present), resized, copies),
        ]
    return checks


def _decode(refer: REFER, image_ids: Sequence[int]) -> tuple[list[str], list[str], list[str]]:
    """Decode images: which cannot be, have another shape than annotated, or only another size."""

    def size_of(image_id: int) -> tuple[tuple[int, int], str] | str:
        record = refer.Imgs[image_id]
        try:
            image = open_rgb(refer.image_path(image_id), refer.max_pixels)
        except InputError as error:
            return str(error)
        return image.size, misfit(image, record["width"], record["height"])

    unreadable, others, resized = [], [], []
    # Decoders release the GIL. The threads share their warning filters.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        sizes = utils.progress(pool.map(size_of, image_ids), "images", 0, len(image_ids))
        for image_id, result in zip(image_ids, sizes, strict=True):
            record = refer.Imgs[image_id]
            expected = (record["width"], record["height"])
            if isinstance(result, str):
                unreadable.append(result)
                continue
            size, reason = result
            if reason:
                others.append(f"{refer.image_path(image_id)} {reason}")
            elif size != expected:
                what = "{}x{} instead of {}x{}".format(*size, *expected)
                resized.append(f"{refer.image_path(image_id)}: {what}")
    return unreadable, others, resized


def as_text(report: Report) -> str:
    """The report for a terminal, without control characters."""
    name = f"{report.dataset}({report.split_by})"
    lines = [f"{name} in {report.folder}, images in {report.image_folder}", ""]
    lines += [*_counts_table(report.splits), "", _counts_verdict(report), ""]
    width = max(len(check.title) for check in report.checks)
    lines.append(f"{'check':{width}}  {'looked at':>9}  {'found':>7}")
    for check in report.checks:
        row = f"{check.title:{width}}  {check.looked_at:>9}  {len(check.found):>7}  {check.verdict}"
        lines.append(row + (f": {check.remark}" if check.remark else ""))
        lines += [f"    {line[:200]}" for line in check.found[:EXAMPLES]]
        if len(check.found) > EXAMPLES:
            lines.append(f"    and {len(check.found) - EXAMPLES} more")
    damaged = sum(check.verdict == "DAMAGE" for check in report.checks)
    notes = sum(check.verdict == "note" for check in report.checks)
    result = f"{damaged} of {len(report.checks)} checks found damage; notes: {notes}"
    lines += ["", f"{name} is {'sound' if report.sound else 'damaged'}: {result}"]
    return "\n".join(map(_printable, lines))


def _counts_table(splits: Sequence[Split]) -> list[str]:
    width = max(7, *(min(len(split.name), 20) for split in splits))
    heads = [f"{head:^20}" for head in ("references", "expressions", "images")]
    lines = [(" " * width + "".join(heads)).rstrip()]
    lines.append(f"{'split':{width}}" + f"{'found':>9}{'published':>11}" * 3)
    for split in splits:
        row = f"{split.name[:20]:{width}}"
        for field in ("refs", "sentences", "images"):
            known = getattr(split.published, field, None)
            text = "-" if known is None else str(known)
            if field == "sentences" and not split.verified:
                text += "?"
            row += f"{getattr(split.found, field):>9}{text:>11}"
        verdict = {True: "  as published", False: "  differs", None: ""}[split.as_published]
        lines.append(row + verdict)
    return lines


def _counts_verdict(report: Report) -> str:
    known = [split for split in report.splits if split.as_published is not None]
    if not known:
        return "No counts are published for this dataset."
    if all(split.as_published for split in known):
        return "All counts are as published."
    return "The counts are not the published ones: a subset, or data of your own."


def _printable(line: str) -> str:
    """The line with control characters escaped."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Arguments of the command line, checked.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = utils.Parser(
        "python -m refer.check", description="Check the files of a dataset in REFER layout."
    )
    p.add_argument("--refer_data_root", default="./refer/data/", help="REFER data root")
    p.add_argument("--dataset", default="refcoco", help="a folder of the data root")
    p.add_argument("--splitBy", default="unc", help="unc; umd or google for refcocog")
    p.add_argument("--image_root", default=None, help="folder of the images, if elsewhere")
    p.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, help="upper limit of an image's pixels"
    )
    p.add_argument("--images", action="store_true", help="decode every image too")
    p.add_argument("--bert_tokenizer", default=None, help="hub name or folder, to count tokens")
    p.add_argument("--max_tokens", type=int, default=20, help="the model's limit (crossvlt: 21)")
    p.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all findings")
    args = p.parse_args(argv)
    for name in ("max_tokens", "max_pixels"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Check the dataset of the command line; exit with 1 if it is damaged.

    Raises:
        InputError: a file is missing or cannot be read at all.
    """
    args = parse(argv)
    if args.json:
        utils.make_folder(args.json.parent)
    tokenizer = load_tokenizer(args.bert_tokenizer) if args.bert_tokenizer else None
    refer = CheckedREFER(
        args.refer_data_root, args.dataset, args.splitBy, args.image_root, args.max_pixels
    )
    if not refer.data["refs"]:
        raise InputError(f"{refer._files[0]} has no references")
    report = examine(refer, tokenizer=tokenizer, max_tokens=args.max_tokens, decode=args.images)
    if args.json:
        utils.write_json(report.as_json(), args.json)
    print(as_text(report))
    if not report.sound:
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main)
