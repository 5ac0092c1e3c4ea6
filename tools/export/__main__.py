"""Write a trained model in a form that other programs run, and check what was written.

    python -m tools.export --resume CKPT --format pretrained --output FOLDER [--results JSON]
    python -m tools.export --resume CKPT --format torch --output lavt.pt2
    python -m tools.export --resume CKPT --format onnx --output FOLDER

``pretrained`` is a folder to share, which all scripts and the hub take; ``torch`` is a program of
torch.export, ``onnx`` a folder with model.onnx, vocabulary and the settings of the input. Inputs
are image (B, 3, H, W) float32, normalised, input_ids and attention_mask (B, N_l) int64; the output
is logits (B, 2, H, W). B is free, H, W and N_l are fixed. For files without a record, flags of the
model tell what weights do not. docs/other_runtimes.md has a script for the ONNX folder alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import utils
from args import UPPER_LIMITS, Parser, add_model_flags, take_from_checkpoint
from lib.checkpoint.rebuild import Trained, open_trained
from lib.errors import InputError
from tools.export.check import IMAGES
from tools.export.pretrained import export_pretrained
from tools.export.programs import export_onnx, export_torch
from tools.trained import given
from utils import log

FORMATS: dict[str, Callable[[Trained, argparse.Namespace], None]] = {
    "pretrained": export_pretrained,
    "torch": export_torch,
    "onnx": export_onnx,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = Parser(
        prog="python -m tools.export",
        description="Write a trained model for another runtime, and check it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_flags(p)
    take_from_checkpoint(p)
    p.add_argument("--resume", required=True, help="checkpoint")
    p.add_argument("--format", required=True, choices=list(FORMATS))
    p.add_argument("--output", required=True, help="torch: a .pt2 file; others: a folder")
    p.add_argument(
        "--img_size",
        type=int,
        help="side of the square input, pixels, which is fixed (default: as trained)",
    )
    p.add_argument("--images", default=str(IMAGES), help="folder of images for the check")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 3], help="batch sizes of the check")
    p.add_argument("--results", help="pretrained: test.py's JSON, for the model card")
    args = p.parse_args(argv)
    limit = UPPER_LIMITS["img_size"]
    if args.img_size is not None and not 0 < args.img_size <= limit:
        raise InputError(f"--img_size {args.img_size}: must be from 1 to {limit}")
    if min(args.batch) < 1:
        raise InputError(f"--batch {min(args.batch)}: must be above 0")
    if args.format == "torch" and Path(args.output).suffix != ".pt2":
        raise InputError(f"--output {args.output}: name a .pt2 file")
    if args.format == "pretrained" and args.img_size is not None:
        raise InputError("--img_size: a folder of --format pretrained keeps that of training")
    if args.format != "pretrained" and args.results:
        raise InputError("--results is for --format pretrained")
    if args.format != "torch" and Path(args.output).is_file():
        raise InputError(f"--output {args.output} is a file: give a folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Export what the command line asks for."""
    args = parse(argv)
    utils.setup_logging(None, 0)
    trained = open_trained(args.resume, given(args), accelerate=False)
    log.info("%s", trained.summary)
    trained_side = trained.settings["img_size"]
    if args.img_size not in (None, trained_side):
        log.warning("warning: exported at %d pixels, trained at %d", args.img_size, trained_side)
        trained.settings["img_size"] = args.img_size
    FORMATS[args.format](trained, args)


if __name__ == "__main__":
    utils.run_script(main)
