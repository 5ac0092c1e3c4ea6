"""End of `make quickstart`: the evaluation's tables, and an image of predictions.

    python -m tools.quickstart_report --results quickstart/results.json --output quickstart

Prints the metrics of each split; the control (the same samples with the right expression and with
that of another object of the same image); the mIoU by kind of expression. Draws predictions.png:
images of the first split, with two objects each. Flags that are not given are those of the
evaluation. IoUs in the figure are at the image's original size, those in the tables at --img_size.
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
from args import (
    Parser,
    check_given,
    common_parser,
    dataset_options,
    protocol_of,
    refer_options,
)
from data.dataset_refer_bert import ReferDataset
from lib.errors import InputError
from lib.evaluation.metrics import Metrics, intersection_union, sample_iou
from lib.evaluation.protocol import warning
from lib.evaluation.tables import format_table
from lib.predictor import Predictor
from lib.visualize import GROUND_TRUTH, Tile, contact_sheet, overlay, write_image
from refer.refer import REFER
from tools.trained import open_model

Splits = dict[str, dict[str, Metrics]]

RIGHT, WRONG = "same, right sentence", "same, sentence of another object"  # rows of test.py
KIND = "kind: "
ROWS = 6  # images in the figure


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
    """The first minus the second, in points; samples and pixels of the first."""
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
                (f"{split}, right expression", rows[RIGHT]),
                (f"{split}, another object's", rows[WRONG]),
                (f"{split}, difference", difference(rows[RIGHT], rows[WRONG])),
            ]
    if control:
        title = "Control: the same samples, with the expression of another object of the image"
        parts.append(f"{title}\n{format_table(control)}")
    kinds = sorted({name for rows in splits.values() for name in rows if name.startswith(KIND)})
    if kinds:
        parts.append(_kind_table(kinds, splits))
    return "\n\n".join(parts)


def _kind_table(kinds: Sequence[str], splits: Splits) -> str:
    """mIoU by kind and split, with the number of expressions."""
    names = [kind.removeprefix(KIND) for kind in kinds]
    width = max(map(len, names))
    lines = ["mIoU by kind of expression (number of expressions)"]
    lines.append(" " * width + "".join(f"{split:>16}" for split in splits))
    for kind, name in zip(kinds, names, strict=True):
        metrics = [rows.get(kind) for rows in splits.values()]
        cells = [f"{m.mIoU:.2f} ({m.samples})" if m else "-" for m in metrics]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def choose(dataset: ReferDataset, rows: int = ROWS) -> list[list[int]]:
    """Samples for the figure, spread over the split.

    Args:
        dataset: a split.
        rows: upper limit of images.

    Returns:
        For each image one sample of each of two objects, or of the only one; images with two
        come first.
    """
    by_image: dict[int, list[Sequence[int]]] = {}
    for samples in dataset.samples_of_ref:
        by_image.setdefault(dataset.records[samples[0]].image_id, []).append(samples)
    pairs = [objects[:2] for objects in by_image.values() if len(objects) > 1]
    singles = [objects for objects in by_image.values() if len(objects) == 1]
    chosen = _spread(pairs, rows)
    chosen += _spread(singles, rows - len(chosen))
    # The rows take the first, second, ... expression in turn.
    return [[samples[i % len(samples)] for samples in objects] for i, objects in enumerate(chosen)]


def _spread(items: list[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


def figure_row(
    dataset: ReferDataset, samples: Sequence[int], predictor: Predictor
) -> list[Tile | None]:
    """One image, then ground truth and prediction of each of its samples."""
    image = dataset.original_image(samples[0])
    expressions = [dataset.records[i].expression for i in samples]
    predictions = predictor.predict(image, expressions)
    row: list[Tile | None] = [Tile(image)]
    for sample, expression, prediction in zip(samples, expressions, predictions, strict=True):
        # Polygons are in the annotated size, which a copy of the image may not have.
        mask = Image.fromarray(dataset.mask(sample).astype(np.uint8))
        truth = np.array(mask.resize(image.size, Image.Resampling.NEAREST), dtype=bool)
        inter, union = intersection_union(
            torch.from_numpy(prediction.mask)[None], torch.from_numpy(truth)[None]
        )
        iou = 100 * sample_iou(inter.numpy(), union.numpy())[0]
        row.append(Tile(overlay(image, truth, color=GROUND_TRUTH), f"“{expression}”"))
        row.append(Tile(overlay(image, prediction.mask), f"IoU {iou:.0f}"))
    return row


def draw(args: argparse.Namespace, path: Path) -> None:
    """Draw predictions on images of the first split.

    Args:
        args: of :func:`parse`.
        path: of the figure.

    Raises:
        InputError: data or checkpoint cannot be used, or the figure cannot be written.
    """
    info = utils.init_distributed(args.device, args.local_rank)
    trained = open_model(args, info.device)
    tokenizer = trained.tokenizer
    predictor = Predictor(
        trained.model, tokenizer, args.img_size, args.max_tokens, args.batch_size, args.amp
    )
    options = dataset_options(args) | {"eval_mode": "each", "original_masks": False}
    dataset = ReferDataset(REFER(**refer_options(args)), args.splits[0], tokenizer, **options)
    rows = [figure_row(dataset, samples, predictor) for samples in choose(dataset)]
    header = ["image", "ground truth", "prediction", "ground truth", "prediction"]
    footer = f"{dataset!r}: IoU in percent, at the image's original size"
    write_image(contact_sheet(rows, header, footer=footer), path)


def parse(
    argv: Sequence[str] | None = None, evaluated: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Arguments of the command line, checked; ``splits`` is the list of ``--split``.

    Args:
        argv: the command line; None for that of the process.
        evaluated: the arguments that test.py wrote into its results, as defaults.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = common_parser(
        "Print an evaluation's tables and draw some of its predictions.", trained=True
    )
    p.prog = "python -m tools.quickstart_report"
    p.set_defaults(**(evaluated or {}))
    add = p.add_argument_group("report", "all other flags default to the evaluation's").add_argument
    add("--results", required=True, help="the JSON file that test.py wrote")
    add("--output", default="./quickstart/", help="folder for predictions.png")
    add("--images", "--pictures", nargs="*", default=[], help="other images to be named too")
    args = p.parse_args(argv)
    args.splits = [s for s in args.split.split(",") if s]
    if not args.splits:
        raise InputError(f"--split {args.split}: give a split to draw predictions of")
    check_given(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Report as the command line says."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--results")
    results = first.parse_known_args(argv)[0].results
    splits, evaluated = read_results(Path(results)) if results else ({}, {})
    args = parse(argv, evaluated)
    utils.setup_logging(None, 0)
    path = Path(args.output) / "predictions.png"
    draw(args, path)
    if noted := warning(protocol_of(args).label):
        utils.log.info("%s\n", noted)
    utils.log.info("%s\n", report(splits))
    for image in [path, *map(Path, args.images)]:
        utils.log.info("image: %s%s", image, "" if image.exists() else " (missing)")


if __name__ == "__main__":
    utils.run_script(main)
