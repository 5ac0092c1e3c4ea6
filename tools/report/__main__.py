"""Turn a file of predictions into one HTML page that explains them.

    python -m tools.report models/ID/predictions.jsonl --refer_data_root ROOT --dataset refcoco
    python -m tools.report --resume CHECKPOINT --split val --refer_data_root ROOT

Metrics as test.py prints them, charts of what is hard, and a gallery of images with true and
predicted masks to filter and sort. The page needs no network and no other file: send it to someone.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import utils
from args import Parser
from lib.errors import InputError
from lib.evaluation.metrics import Metrics
from lib.evaluation.protocol import warning
from lib.visualize import GROUND_TRUTH, PREDICTION
from refer.images import MAX_PIXELS, open_rgb
from refer.names import Finder
from refer.rare_images import misfit
from refer.refer import image_folder
from tools.report import charts
from tools.report.breakdown import Breakdown, breakdowns, mean_with_interval, object_codes
from tools.report.records import STANDARD, Prediction, counts_of, read_records

HERE = Path(__file__).parent
JPEG_QUALITY = 72
INDENT = "  "  # before the name of a row that is a part of the one above
SIDES = (32, 4096)  # of an embedded image, pixels

ImageKey = tuple[str, int, int]  # file name; height, width of the annotation
Columns = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The same samples in another file of predictions.

    Attributes:
        others: for each sample the other prediction, None where the other file has none.
        unmatched: samples of the other file that are not in this one.
    """

    others: list[Prediction | None]
    unmatched: int


def read_all(paths: Sequence[str]) -> list[Prediction]:
    """Samples of one or several files that have none in common.

    Raises:
        InputError: a file is damaged, or they do not go together.
    """
    samples: list[Prediction] = []
    seen: dict[tuple[Any, ...], str] = {}
    for path in paths:
        more = read_records(path)
        if samples and more[0].protocol != samples[0].protocol:
            raise InputError(f"{path} is of another protocol than {paths[0]}: report them apart")
        for sample in more:
            if sample.key in seen:
                raise InputError(
                    f"{path} has samples that {seen[sample.key]} has too: to compare two "
                    "evaluations of the same samples give one of them with --compare"
                )
        seen |= {sample.key: path for sample in more}
        samples += more
    return samples


def compare(samples: Sequence[Prediction], path: str) -> Comparison:
    """Find the samples in another file.

    Raises:
        InputError: the file is damaged, of another protocol, or has none of them.
    """
    other = {sample.key: sample for sample in read_records(path)}
    first = next(iter(other.values()))
    if first.protocol != samples[0].protocol:
        raise InputError(f"--compare {path}: protocol '{first.protocol[:80]}', not the same")
    others = [other.get(sample.key) for sample in samples]
    found = sum(o is not None for o in others)
    if not found:
        raise InputError(f"--compare {path} has none of the samples")
    for sample, match in zip(samples, others, strict=True):
        if match and match.truth != sample.truth:
            raise InputError(
                f"--compare {path}: another true mask of reference {sample.ref_id} "
                f"({sample.split}): the data or --mask_mode were not the same"
            )
    return Comparison(others, len(other) - found)


def spread(count: int, most: int) -> list[int]:
    """``most`` of ``count`` positions, evenly spread; all of them where most is 0."""
    if not most or count <= most:
        return list(range(count))
    return [i * count // most for i in range(most)]


def thumbnails(
    sizes: Mapping[str, tuple[int, int]], folder: Path, side: int, max_pixels: int = MAX_PIXELS
) -> tuple[dict[str, str], dict[str, str]]:
    """Images as small JPEGs in base64.

    Args:
        sizes: width and height of the annotations of each file, pixels.
        folder: that they are in.
        side: of the longer side, pixels; smaller images stay as they are.
        max_pixels: upper limit of an image's size.

    Returns:
        JPEG by name, and what was wrong by name for images that could not be read.
    """
    found, wrong = {}, {}
    finder = Finder(folder, sizes)
    for name, size in utils.progress(sizes.items(), "images", 0, len(sizes)):
        try:
            path = finder.path(name, "the predictions")
            image = open_rgb(path, max_pixels)
            if reason := misfit(image, *size):
                raise InputError(f"image {path} {reason}")
        except InputError as e:
            wrong[name] = str(e)
            continue
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=JPEG_QUALITY, optimize=True)
        found[name] = base64.b64encode(packed.getvalue()).decode()
    return found, wrong


def metric_rows(samples: Sequence[Prediction]) -> list[tuple[str, Metrics]]:
    """A row for each split, and below it for each kind of expression in it, indented."""
    rows = []
    for split in dict.fromkeys(s.split for s in samples):
        of_split = [s for s in samples if s.split == split]
        rows.append((split, counts_of(of_split).summarise()))
        for kind in sorted({s.kind for s in of_split if s.kind is not None}):
            of_kind = counts_of([s for s in of_split if s.kind == kind])
            rows.append((f"{INDENT}kind: {kind}", of_kind.summarise()))
    return rows


def _ious(samples: Sequence[Prediction]) -> npt.NDArray[np.float64]:
    return counts_of(samples).iou()  # the written IoU may be rounded


def metrics_table(rows: Sequence[tuple[str, Metrics]], protocol: str) -> str:
    """The metrics as an HTML table, with the digits of test.py's."""
    mark = "" if protocol == STANDARD else f" <small>[{escape(protocol)}]</small>"
    head = [*rows[0][1].row(), "n"]
    lines = ["<thead><tr><th></th>" + "".join(f"<th>{h}</th>" for h in head) + "</tr></thead>"]
    for name, m in rows:
        numbers = ["-" if v != v else f"{v:.2f}" for v in m.row().values()]
        cells = [*numbers, str(m.samples)]
        css = ' class="kind"' if name.startswith(INDENT) else ""
        lines.append(
            f'<tr{css}><th scope="row">{escape(name.strip())}{mark}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def chart_section(samples: Sequence[Prediction], groups: Sequence[Breakdown]) -> str:
    """The charts: of all samples together and, where there are several splits, of each."""
    iou, codes = _ious(samples), object_codes(samples)
    target = np.array([not s.no_target for s in samples])
    splits = list(dict.fromkeys(s.split for s in samples))
    of_split = np.array([splits.index(s.split) for s in samples])
    selections = [("", np.full(len(samples), True))]
    if len(splits) > 1:
        selections += [(split, of_split == i) for i, split in enumerate(splits)]
    return "".join(
        f'<div class="charts" data-split="{escape(name)}"{" hidden" if name else ""}>'
        + "".join(_charts(splits, of_split, iou, target, codes, groups, chosen))
        + "</div>"
        for name, chosen in selections
    )


def _charts(
    splits: Sequence[str],
    of_split: npt.NDArray[np.int64],
    iou: npt.NDArray[np.float64],
    target: npt.NDArray[np.bool_],
    codes: npt.NDArray[np.int64],
    groups: Sequence[Breakdown],
    chosen: npt.NDArray[np.bool_],
) -> Iterable[str]:
    yield _figure("IoU", charts.histogram(iou[chosen]), "")
    shown = chosen & target  # as P@K in the table
    curves = {
        name: iou[shown & (of_split == i)]
        for i, name in enumerate(splits)
        if (shown & (of_split == i)).any()
    }
    mean = "mIoU" if target.all() else "mean IoU of expressions with a target"
    yield _figure("Precision at K", charts.precision_curves(curves, mean), "")
    for group in groups:
        members = [chosen & group.members[:, i] for i in range(len(group.labels))]
        means = [mean_with_interval(iou[m], codes[m]) for m in members]
        chart = charts.group_means(group, means, float(iou[chosen].mean()))
        yield _figure(group.title, chart, group.note)


def _figure(title: str, chart: str, note: str) -> str:
    about = f"<details><summary>About</summary>{escape(note)}</details>" if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}{about}</figure>"


def gallery(
    samples: Sequence[Prediction],
    groups: Sequence[Breakdown],
    images: dict[ImageKey, int],
    comparison: Comparison | None,
    chosen: Sequence[int],
) -> Columns:
    """The samples of the gallery, column by column; repeated values stand once and are numbered."""
    picked = [samples[i] for i in chosen]
    columns: Columns = {
        "image": [images[s.file_name, s.height, s.width] for s in picked],
        "sent_ids": [list(s.sent_ids) for s in picked],
        "bins": {g.key: _bits(g.members[list(chosen)]) for g in groups},
        "prediction": [s.segmentation.counts for s in picked],
        "score": [round(s.score, 3) for s in picked],
    }
    same = ("sentence", "ref_id", "ann_ids", "same_category", "intersection", "union")
    columns |= {name: [getattr(s, name) for s in picked] for name in same}
    if any(s.metrics != "standard" for s in picked):
        columns["iou"] = [round(iou, 6) for iou in _ious(picked).tolist()]
        columns["no_target"] = [[s.no_target, s.predicted_no_target] for s in picked]
    for name in ("split", "category", "kind"):
        columns[name], columns[f"{name}_names"] = _numbered([getattr(s, name) for s in picked])
    columns["truth"], columns["truth_masks"] = _numbered([s.truth.counts for s in picked])
    if comparison:
        others = [comparison.others[i] for i in chosen]
        columns["other"] = [o and o.segmentation.counts for o in others]
        columns["other_pixels"] = [o and [o.intersection, o.union] for o in others]
        if "iou" in columns:
            columns["other_iou"] = [o and round(float(_ious([o])[0]), 6) for o in others]
    return {
        "columns": columns,
        "images": [{"file": name, "height": h, "width": w} for name, h, w in images],
        "groups": {g.key: {"title": g.title, "labels": g.labels} for g in groups},
        "colors": {"truth": GROUND_TRUTH, "prediction": PREDICTION},
    }


def _bits(members: npt.NDArray[np.bool_]) -> list[int]:
    """Rows of booleans as integers, the first column in the lowest bit."""
    return (members @ (1 << np.arange(members.shape[1]))).tolist()


def _numbered(values: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Position of each value in a list of the different ones, and that list."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(v, len(numbers)) for v in values], list(numbers)


def for_script(content: Any) -> str:
    """JSON that can stand inside a <script> element: ASCII, and without a '<' that could end it."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _protocol_note(protocol: str) -> str:
    if protocol == STANDARD:
        return "<p>Protocol: standard.</p>"
    if not warning(protocol):
        return f"<p>Protocol: standard, {escape(protocol)}.</p>"
    return (
        f'<p class="warning"><strong>Not the standard protocol: {escape(protocol)}.</strong> '
        "These numbers are not to be compared with published ones.</p>"
    )


def _comparison_note(samples: Sequence[Prediction], comparison: Comparison, path: str) -> str:
    pairs = [(s, o) for s, o in zip(samples, comparison.others, strict=True) if o]
    mine = [s for s, _ in pairs]
    delta = _ious(mine) - _ious([o for _, o in pairs])
    better, worse = int((delta > 0).sum()), int((delta < 0).sum())
    mean = mean_with_interval(100 * delta, object_codes(mine))
    left = len(samples) - len(pairs)
    unmatched = f" Without a partner: {left} here, {comparison.unmatched} there."
    return (
        f"<p>Compared with {escape(path)}: mean IoU {mean.value:+.2f} points (95 % interval "
        f"{mean.low:+.2f} to {mean.high:+.2f}) over {len(pairs):,} samples; "
        f"{better:,} better, {worse:,} worse, {len(pairs) - better - worse:,} the same."
        f"{unmatched if left or comparison.unmatched else ''}</p>"
    )


def _image_scripts(images: dict[ImageKey, int], jpegs: dict[str, str]) -> str:
    """An element for each image, which the browser does not decode before it is shown."""
    return "\n".join(
        f'<script type="text/plain" id="image-{number}">{jpegs[name]}</script>'
        for (name, _, _), number in images.items()
        if name in jpegs
    )


def build_page(
    samples: Sequence[Prediction],
    sources: Sequence[str],
    jpegs: dict[str, str],
    chosen: Sequence[int],
    comparison: Comparison | None = None,
    compared: str = "",
) -> str:
    """The page.

    Args:
        samples: all that metrics and charts are of.
        sources: names of the files that they are from.
        jpegs: the images by file name, base64; one that is not there is shown as a grey box.
        chosen: positions of the samples that the gallery shows.
        comparison: of these samples with those of another file.
        compared: that file's name.

    Returns:
        HTML that refers to nothing outside itself.
    """
    groups = breakdowns(samples)
    picked = [samples[i] for i in chosen]
    images: dict[ImageKey, int] = {}
    for s in picked:
        images.setdefault((s.file_name, s.height, s.width), len(images))
    script, style = (
        (HERE / name).read_text(encoding="utf-8") for name in ("report.js", "report.css")
    )
    note = _protocol_note(samples[0].protocol)
    if comparison:
        note += _comparison_note(samples, comparison, compared)
    whole = len(chosen) == len(samples)
    page = Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style,
        sources=escape(", ".join(sources)),
        counts=f"{len(samples):,} expressions, {len({s.object for s in samples}):,} objects, "
        f"{len({s.file_name for s in samples}):,} images",
        note=note,
        metrics=metrics_table(metric_rows(samples), samples[0].protocol),
        charts=chart_section(samples, groups),
        shown="" if whole else f"{len(chosen):,} of {len(samples):,} samples, evenly spread.",
        data=for_script(gallery(samples, groups, images, comparison, chosen)),
        images=_image_scripts(images, jpegs),
    )
    return page.encode("utf-8", "replace").decode()  # without lone surrogates


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: naming the option and what it takes.
    """
    p = Parser(
        "python -m tools.report", description="Explain predictions in one self-contained HTML page."
    )
    p.add_argument(
        "records", nargs="*", help="what test.py --predictions wrote; several are joined"
    )
    p.add_argument("--resume", default="", help="instead: evaluate this checkpoint first")
    p.add_argument("--split", default="", help="with --resume: a split, or several: val,testA")
    p.add_argument("--compare", default="", metavar="FILE", help="other predictions, same samples")
    p.add_argument("--refer_data_root", default="./refer/data/", help="finds the images")
    p.add_argument(
        "--dataset", default="", help="whose images are meant (refcoco; --resume: the checkpoint's)"
    )
    p.add_argument("--image_root", default="", help="or the folder of the images itself")
    p.add_argument("--output", type=Path, default=Path("report.html"))
    p.add_argument("--max_samples", type=int, default=0, help="in the gallery; 0 (default): all")
    p.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, help="upper limit of an image's pixels"
    )
    p.add_argument(
        "--image_side",
        "--photo_side",
        type=int,
        default=320,
        help="longer side (default: 320 pixels)",
    )
    args = p.parse_args(argv)
    if bool(args.records) == bool(args.resume):
        raise InputError("give files of test.py --predictions, or a checkpoint by --resume")
    if args.split and not args.resume:
        raise InputError("--split is for --resume: a file of predictions has its splits")
    if args.max_samples < 0:
        raise InputError(f"--max_samples {args.max_samples}: give a number, or 0 for all")
    if args.max_pixels < 1:
        raise InputError(f"--max_pixels {args.max_pixels}: must be 1 or more")
    if not SIDES[0] <= args.image_side <= SIDES[1]:
        raise InputError(f"--image_side {args.image_side}: give {SIDES[0]} to {SIDES[1]} pixels")
    return args


def evaluate(args: argparse.Namespace) -> None:
    """Run test.py on the checkpoint; its predictions and results go beside the page.

    Ends with its exit code if it fails, after its error.
    """
    results = args.output.with_suffix(".json")
    args.records = [str(args.output.with_suffix(".jsonl"))]
    options = {"resume": args.resume, "split": args.split, "dataset": args.dataset}
    options |= {"refer_data_root": args.refer_data_root, "image_root": args.image_root}
    options |= {"max_pixels": str(args.max_pixels), "predictions": args.records[0]}
    options |= {"results": str(results)}
    flags = [word for name, value in options.items() if value for word in (f"--{name}", value)]
    if code := subprocess.run(
        [sys.executable, str(HERE.parents[1] / "test.py"), *flags]
    ).returncode:
        sys.exit(code)
    args.dataset = json.loads(results.read_text(encoding="utf-8"))["args"]["dataset"]


def main(argv: Sequence[str] | None = None) -> None:
    """Report as the command line says."""
    args = parse(argv)
    if args.resume:
        evaluate(args)
    folder = image_folder(Path(args.refer_data_root), args.dataset or "refcoco", args.image_root)
    samples = read_all(args.records)
    comparison = compare(samples, args.compare) if args.compare else None
    chosen = spread(len(samples), args.max_samples)
    sizes = {samples[i].file_name: (samples[i].width, samples[i].height) for i in chosen}
    jpegs, wrong = thumbnails(sizes, folder, args.image_side, args.max_pixels)
    if wrong:
        first = next(iter(wrong.values()))
        if not jpegs:
            raise InputError(f"none of the {len(sizes)} images can be read (--image_root): {first}")
        print(f"{len(wrong)} of {len(sizes)} images cannot be shown: {first}")
    page = build_page(samples, args.records, jpegs, chosen, comparison, args.compare)
    utils.write_text(page, args.output)
    print(f"written: {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    utils.run_script(main)
