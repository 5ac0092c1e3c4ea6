"""Segment the objects that expressions refer to, in images.

python demo_inference.py --image photo.jpg --sentence "the dog on the left" --resume CKPT
python demo_inference.py --image FOLDER --sentence "dog" "cat" --resume CKPT --output DIR
python demo_inference.py --list pairs.json --resume CKPT --output DIR --caption --mask --rle --prob
python demo_inference.py ... --attention

All files have the image's original size. A camera's EXIF orientation is applied first, so that
"left" is the left of the image as people see it. (Training and test.py do not apply it:
annotations are in the file's own pixel coordinates.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import utils
from lib.attention import fusions
from lib.errors import InputError
from lib.evaluation.evaluator import Prediction
from lib.predictor import Predictor, open_upright
from lib.visualize import overlay, printable, write_image
from refer.masks import run_lengths
from tools.demo_jobs import Job, parse_demo, plan, read_requests, side_files
from tools.trained import open_model
from utils import log

SHOWN = 40  # characters of a name or expression in the table


def main(argv: Sequence[str] | None = None) -> None:
    """Predict what the command line asks for."""
    args = parse_demo(argv)
    jobs = plan(read_requests(args), Path(args.output))
    info = utils.init_distributed(args.device, args.local_rank)
    utils.setup_logging(None, info.rank)
    trained = open_model(args, info.device)
    if args.attention:
        fusions(trained.model)  # raises an error if it has none, before anything is written
    predictor = Predictor(
        trained.model, trained.tokenizer, args.img_size, args.max_tokens, args.batch_size, args.amp
    )
    for expression in sorted({e for job in jobs for e in job.expressions}):
        if predictor.is_cut(expression):
            what = (args.max_tokens, _short(expression))
            log.warning('warning: the model reads only the first %d tokens of "%s"', *what)
    row = _table(jobs)
    log.info("%s", row("image", "expression", "covered", "overlay"))
    unread = 0
    for job in jobs:
        try:
            image = open_upright(job.image, args.max_pixels)
        except InputError as e:
            if len(jobs) == 1:
                raise
            print(f"error: {e}", file=sys.stderr, flush=True)
            unread += 1
            continue
        predictions = predictor.predict(image, job.expressions)
        write_files(job, image, predictions, args)
        if args.attention:
            for expression, path, prediction in zip(
                job.expressions, job.overlays, predictions, strict=True
            ):
                figure = predictor.draw_attention(image, expression, prediction)
                write_image(figure, side_files(path)["attention"])
        for expression, path, prediction in zip(
            job.expressions, job.overlays, predictions, strict=True
        ):
            covered = float(prediction.mask.mean())
            log.info("%s", row(job.image.name, expression, f"{covered:.2%}", path))
            if not covered:
                what = (printable(job.image.name), _short(expression))
                log.warning('warning: the mask of %s is empty for "%s"', *what)
    if unread:
        print(f"error: {unread} of {len(jobs)} images could not be read", file=sys.stderr)
        sys.exit(1)


def write_files(
    job: Job, image: Image.Image, predictions: Sequence[Prediction], args: argparse.Namespace
) -> None:
    """Write overlay, mask, RLE and probabilities of each expression of a job.

    Raises:
        InputError: a file cannot be written.
    """
    for expression, path, prediction in zip(
        job.expressions, job.overlays, predictions, strict=True
    ):
        mask, files = prediction.mask, side_files(path)
        write_image(overlay(image, mask, expression if args.caption else None), path)
        if args.mask:
            write_image(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)), files["mask"])
        if args.rle:
            utils.write_json(run_lengths(mask), files["rle"])
        if args.prob:
            deep = np.rint(prediction.probability.astype(np.float64) * 65535).astype(np.uint16)
            write_image(Image.fromarray(deep), files["prob"])


def _table(jobs: Sequence[Job]) -> Callable[..., str]:
    """A function that formats a row of the table."""
    images = max(len(_short(job.image.name)) for job in jobs)
    expressions = max(len(_short(e)) for job in jobs for e in job.expressions)
    widths = max(images, len("image")), max(expressions, len("expression"))

    def row(image: str, expression: str, covered: str, overlay: object) -> str:
        columns = f"{_short(image):<{widths[0]}}  {_short(expression):<{widths[1]}}"
        return f"{columns}  {covered:>8}  {printable(str(overlay))}"

    return row


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


if __name__ == "__main__":
    utils.run_script(main)
