"""End of `make quickstart`: the evaluation's tables, and pictures of what the model does.

    python -m tools.quickstart_report --results quickstart/results.json --output quickstart

Prints the metrics of each split; below them the control (the same samples with the right sentence
and with that of another object of the same picture); below that the mIoU by kind of expression.
Draws predictions.png: pictures of the first split, each asked for two of its objects. Options that
are not given are those of the evaluation. IoUs in the figure are taken at the picture's own size,
those in the tables at --img_size, as test.py does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import utils
from args import Parser, dataset_options, parse_report, protocol_of, refer_options
from bert.tokenizer import Tokenizer
from data.dataset_refer_bert import ReferDataset
from demo_inference import load, predict
from lib.errors import InputError
from lib.evaluation.evaluator import resize_prediction
from lib.evaluation.metrics import Metrics, intersection_union, sample_iou
from lib.evaluation.protocol import warning
from lib.evaluation.tables import format_table
from lib.model import Segmenter
from lib.visualize import TRUTH, Tile, contact_sheet, overlay, write_picture
from refer.refer import REFER

Splits = dict[str, dict[str, Metrics]]

RIGHT, WRONG = "same, right sentence", "same, sentence of another object"  # rows of test.py
KIND = "kind: "
ROWS = 6  # pictures in the figure


def read_results(path: Path) -> tuple[Splits, dict[str, Any]]:
    """Metrics by split and row, and the evaluation's arguments, from test.py's results.

    Raises:
        InputError: the file is missing or not of test.py.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        splits = {
            split: {name: _metrics(row) for name, row in rows.items()}
            for split, rows in content["splits"].items()
        }
        if not splits or not all("all" in rows for rows in splits.values()):
            raise ValueError("no split, or one without totals")
        return splits, dict(content["args"])
    except FileNotFoundError as e:
        raise InputError(f"--results {path} does not exist: run test.py --results {path}") from e
    except OSError as e:
        raise InputError(f"--results {path} cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"--results {path} is not what test.py writes: run it again") from e


def _metrics(row: dict[str, Any]) -> Metrics:
    known = {f.name: row[f.name] for f in fields(Metrics)}
    if known["oIoU"] is None:  # JSON has no nan
        known["oIoU"] = float("nan")
    return Metrics(**known)


def difference(a: Metrics, b: Metrics) -> Metrics:
    """The first less the second, in points; the counts of samples and pixels are the first's."""
    return Metrics(
        mIoU=a.mIoU - b.mIoU,
        oIoU=a.oIoU - b.oIoU,
        precision={k: a.precision[k] - b.precision[k] for k in a.precision},
        samples=a.samples,
        intersection=a.intersection,
        union=a.union,
    )


def report(splits: Splits) -> str:
    """The tables, as text."""
    parts = ["All expressions\n" + format_table([(s, rows["all"]) for s, rows in splits.items()])]
    control = []
    for split, rows in splits.items():
        if RIGHT in rows and WRONG in rows:
            control += [
                (f"{split}, right sentence", rows[RIGHT]),
                (f"{split}, another object's", rows[WRONG]),
                (f"{split}, difference", difference(rows[RIGHT], rows[WRONG])),
            ]
    if control:
        title = (
            "Does the sentence decide? The same samples, asked for another object of the picture"
        )
        parts.append(f"{title}\n{format_table(control)}")
    kinds = sorted({name for rows in splits.values() for name in rows if name.startswith(KIND)})
    if kinds:
        parts.append(_kind_table(kinds, splits))
    return "\n\n".join(parts)


def _kind_table(kinds: Sequence[str], splits: Splits) -> str:
    """mIoU by kind and split, the number of expressions in brackets."""
    names = [kind.removeprefix(KIND) for kind in kinds]
    width = max(map(len, names))
    lines = ["mIoU by kind of expression (number of expressions)"]
    lines.append(" " * width + "".join(f"{split:>16}" for split in splits))
    for kind, name in zip(kinds, names, strict=True):
        found = [rows.get(kind) for rows in splits.values()]
        cells = [f"{m.mIoU:.2f} ({m.samples})" if m else "-" for m in found]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def choose(dataset: ReferDataset, rows: int = ROWS) -> list[list[int]]:
    """Samples for the figure, spread over the split.

    Args:
        dataset: a split.
        rows: number of pictures, fewer where the split has fewer.

    Returns:
        For each picture one sample of each of two objects, or of the only one; pictures with
        two come first.
    """
    by_picture: dict[int, list[Sequence[int]]] = {}
    for samples in dataset.samples_of_ref:
        by_picture.setdefault(dataset.records[samples[0]].image_id, []).append(samples)
    pairs = [objects[:2] for objects in by_picture.values() if len(objects) > 1]
    singles = [objects for objects in by_picture.values() if len(objects) == 1]
    chosen = _spread(pairs, rows)
    chosen += _spread(singles, rows - len(chosen))
    # Of an object's sentences another one in each row, for the variety's sake.
    return [[samples[i % len(samples)] for samples in objects] for i, objects in enumerate(chosen)]


def _spread(items: list[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


def figure_row(
    dataset: ReferDataset,
    samples: Sequence[int],
    model: Segmenter,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
) -> list[Tile | None]:
    """One picture, then truth and prediction for each of its samples."""
    picture = dataset.picture(samples[0])
    sentences = [dataset.records[i].sentence for i in samples]
    logits = predict(
        model,
        tokenizer,
        picture,
        sentences,
        args.img_size,
        args.max_tokens,
        args.batch_size,
        args.amp,
    )
    row: list[Tile | None] = [Tile(picture)]
    for sample, sentence, of_sentence in zip(samples, sentences, logits, strict=True):
        # Polygons are in the annotated size, which a copy of the picture may not have.
        mask = Image.fromarray(dataset.mask(sample).astype(np.uint8))
        truth = np.array(mask.resize(picture.size, Image.Resampling.NEAREST), dtype=bool)
        found = resize_prediction(of_sentence, picture.height, picture.width).mask
        inter, union = intersection_union(
            torch.from_numpy(found)[None], torch.from_numpy(truth)[None]
        )
        iou = 100 * sample_iou(inter.numpy(), union.numpy())[0]
        row.append(Tile(overlay(picture, truth, color=TRUTH), f"“{sentence}”"))
        row.append(Tile(overlay(picture, found), f"IoU {iou:.0f}"))
    return row


def draw(args: argparse.Namespace, path: Path) -> None:
    """Draw predictions on pictures of the first split.

    Args:
        args: of :func:`args.parse_report`.
        path: of the picture.

    Raises:
        InputError: data or checkpoint cannot be used, or the picture cannot be written.
    """
    info = utils.init_distributed(args.device, args.local_rank)
    model, tokenizer = load(args, info.device)
    refer = REFER(**refer_options(args))
    options = dataset_options(args) | {"eval_mode": "each", "photo_masks": False}
    dataset = ReferDataset(refer, args.splits[0], tokenizer, **options)
    rows = [figure_row(dataset, samples, model, tokenizer, args) for samples in choose(dataset)]
    header = ["picture", "truth", "prediction", "truth", "prediction"]
    footer = f"{dataset!r}: IoU in percent, at the picture's own size"
    write_picture(contact_sheet(rows, header, footer=footer), path)


def main(argv: Sequence[str] | None = None) -> None:
    """Report as the command line says."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--results")
    results = first.parse_known_args(argv)[0].results
    splits, evaluated = read_results(Path(results)) if results else ({}, {})
    args = parse_report(argv, evaluated)
    utils.setup_logging(None, 0)
    path = Path(args.output) / "predictions.png"
    draw(args, path)
    if noted := warning(protocol_of(args).label):
        utils.log.info("%s\n", noted)
    utils.log.info("%s\n", report(splits))
    for picture in [path, *map(Path, args.pictures)]:
        utils.log.info("picture: %s%s", picture, "" if picture.exists() else " (not there)")


if __name__ == "__main__":
    utils.run_script(main)
