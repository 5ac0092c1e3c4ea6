"""The command lines of train.py, test.py and demo_inference.py, and their checks."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.cache import ArrayCache, default_folder
from lib.errors import InputError
from lib.evaluation.protocol import (
    EVAL_MODES,
    EVAL_SIZES,
    MASK_MODES,
    TEXTS,
    VAL_EXPRESSIONS,
    Protocol,
)
from lib.lavt import parse_heads
from lib.losses import LOSSES
from lib.recipes import expand
from lib.runtime import AMP
from lib.segmentation import MODELS
from lib.swin import SWIN_SIZES
from lib.training.optim import NORM_DECAY, PUBLISHED_LANG_LAYERS
from lib.variants import CHOICES, Variant

TABLE_ENDINGS = (".md", ".tex", ".csv")
DATASETS = ("refcoco", "refcoco+", "refcocog", "refclef")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are :class:`InputError`, so that all look alike."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, with the options of recipes (``@recipes/NAME.args``) before the others."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(expand(words, self.prog), namespace)

    def error(self, message: str) -> Any:
        """Raise instead of exiting."""
        raise InputError(f"{message} ({self.prog} --help lists the options)")


def _lang_layers(text: str) -> int | None:
    if text == "all":
        return None
    return int(text)


def common_parser(description: str) -> Parser:
    """Options of the published scripts, which train.py and test.py take alike."""
    p = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = p.add_argument_group("model")
    model.add_argument("--model", default="lavt", choices=list(MODELS))
    model.add_argument("--swin_type", default="base", choices=list(SWIN_SIZES))
    model.add_argument("--window12", action="store_true", help="Swin windows of 12, not 7")
    model.add_argument("--mha", default="", help="heads of the four PWAMs, a-b-c-d ('': 1-1-1-1)")
    model.add_argument("--fusion_drop", type=float, default=0.0, help="dropout in PWAM")
    model.add_argument(
        "--ape",
        type=int,
        default=0,
        metavar="N",
        help="absolute position embedding on an N x N grid (0: none, as published)",
    )
    model.add_argument("--bert_tokenizer", default="bert-base-uncased", help="hub name or folder")
    model.add_argument("--ck_bert", default="bert-base-uncased", help="hub name or folder")
    model.add_argument(
        "--ddp_trained_weights",
        action="store_true",
        help="accepted for the published command lines; a pooler is handled either way",
    )
    _add_variants(p)
    data = p.add_argument_group("data")
    data.add_argument("--dataset", default="refcoco", choices=DATASETS)
    data.add_argument("--splitBy", default="unc", help="unc; umd or google for refcocog")
    data.add_argument("--split", default="test", help="test.py: a split, or several: val,testA")
    data.add_argument("--refer_data_root", default="./refer/data/", help="REFER data root")
    data.add_argument("--image_root", default=None, help="folder of the pictures, if elsewhere")
    data.add_argument(
        "--data_cache",
        metavar="DIR|off",
        help="where annotations are kept as arrays between runs: <data root>/.cache, or "
        "~/.cache/lavt where that cannot be written to; it may be deleted at any time",
    )
    data.add_argument(
        "--mask_mode",
        choices=MASK_MODES,
        default="release",
        help="pixels in two polygons of an object: background as in the release, or object",
    )
    data.add_argument(
        "--text", choices=TEXTS, default="raw", help="expressions as written, or cleaned"
    )
    data.add_argument(
        "--max_tokens", type=int, default=None, help="where a text is cut (20; crossvlt: 21)"
    )
    data.add_argument("--img_size", type=int, default=480, help="square resize, pixels")
    data.add_argument(
        "-b", "--batch-size", type=int, default=None, help="per process (8; crossvlt: 6)"
    )
    data.add_argument("-j", "--workers", type=int, default=8, help="loader processes, each")
    data.add_argument("--pin_mem", action="store_true", help="pinned host memory")
    run = p.add_argument_group("run")
    run.add_argument("--model_id", default="lavt", help="names the run: ./models/<model_id>/")
    run.add_argument("--output-dir", default="./checkpoints/", help="where checkpoints go")
    run.add_argument(
        "--resume",
        default="",
        help="checkpoint: train continues (auto: from its newest), test loads",
    )
    run.add_argument("--device", default="cuda:0", help="the CPU is used where there is no CUDA")
    run.add_argument("--print-freq", type=int, default=10, help="steps between log lines")
    run.add_argument("--amp", default="off", choices=AMP, help="mixed precision")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--channels-last", action="store_true", help="memory format of convolutions")
    run.add_argument("--tf32", action="store_true", help="float32 matmuls of a GPU in TF32")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    train = p.add_argument_group("training")
    train.add_argument("--pretrained_swin_weights", default="", help="ImageNet Swin checkpoint")
    train.add_argument("--epochs", type=int, default=40)
    train.add_argument("--lr", type=float, default=None, help="initial rate (5e-5; crossvlt: 3e-5)")
    train.add_argument("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-2)
    train.add_argument("--amsgrad", action="store_true")
    return p


def _add_variants(p: Parser) -> None:
    """Options for :class:`lib.variants.Variant`."""
    g = p.add_argument_group("ablations (lavt, lavt_one)", "the defaults are the published network")
    helps = {
        "lang_path": "off: V' = V, fused features go to the decoder only",
        "gate": "activation of the language gate; none: no activation, off: V' = V + F",
        "fusion": "PWAM, or the sentence's mean word joined to every pixel alike",
        "pwam_attention": "weights of the words: they compete, or each alone",
        "pwam_combine": "pixels with the words they gathered; words: these alone",
        "pwam_norm": "norm of PWAM's queries and of the gathered words",
        "decoder_features": "F: before the gate, V: V' = V + gate(F) * F",
    }
    for name, text in helps.items():
        g.add_argument(f"--{name}", choices=CHOICES[name], default=CHOICES[name][0], help=text)


def variant(args: argparse.Namespace) -> Variant:
    """The ablation that the options ask for.

    Raises:
        InputError: options that have no meaning together.
    """
    return Variant(**{name: getattr(args, name) for name in CHOICES})


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of train.py, checked.

    Raises:
        InputError: naming the option and what it takes.
    """
    p = common_parser("Train a referring image segmentation model.")
    p.prog = "train.py"
    g = p.add_argument_group("beyond the published options")
    g.add_argument("--loss", default="ce", choices=list(LOSSES))
    g.add_argument(
        "--scale_lr",
        type=int,
        default=0,
        metavar="BASE",
        help="--lr is for so many samples a step: scale it with processes, --batch-size and "
        "--accumulate (0: do not)",
    )
    g.add_argument("--drop_path", type=float, default=0.3, help="rate of the last Swin block")
    g.add_argument(
        "--lang_layers",
        type=_lang_layers,
        default=PUBLISHED_LANG_LAYERS,
        metavar="N|all",
        help="train the first N BERT layers, or all of BERT with its embeddings",
    )
    g.add_argument(
        "--norm_decay",
        choices=NORM_DECAY,
        default="published",
        help="weight decay of norms and biases (published: the backbone's norms are spared)",
    )
    g.add_argument(
        "--text_dropout",
        choices=("model", "on", "off"),
        default="model",
        help="BERT's dropout while training (model: off for lavt, on for lavt_one)",
    )
    g.add_argument("--val_split", default="val", help="split evaluated while training")
    g.add_argument("--val_expressions", choices=VAL_EXPRESSIONS, default=None, help="per object")
    g.add_argument("--eval_every", type=int, default=1, metavar="N", help="epochs")
    g.add_argument(
        "--stop_after",
        type=int,
        default=0,
        metavar="N",
        help="stop after N epochs",
    )
    g.add_argument(
        "--save-every",
        default="",
        metavar="N|Nm",
        help="save the state every N steps, or N minutes, besides after each epoch",
    )
    g.add_argument(
        "--save_error",
        choices=("stop", "continue"),
        default="stop",
        help="where a state cannot be written (full disk): stop, or train on and try again",
    )
    g.add_argument(
        "--nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="at a loss or gradient that is no number: stop, or leave out that step",
    )
    g.add_argument(
        "--clip_grad", type=float, default=0.0, metavar="NORM", help="clip gradients (0: do not)"
    )
    g.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches that make one step"
    )
    g.add_argument(
        "--grad-checkpoint", action="store_true", help="less memory: compute Swin blocks twice"
    )
    g.add_argument(
        "--fused_adamw",
        choices=("on", "off"),
        default="on",
        help="AdamW in one kernel, or as PyTorch chooses, which rounds otherwise",
    )
    g.add_argument("--deterministic", action="store_true", help="the same bits in every run")
    g.add_argument(
        "--tensorboard", action="store_true", help="also write models/<model_id>/tensorboard/"
    )
    g.add_argument("--text_from_scratch", action="store_true", help="load no BERT weights")
    args = p.parse_args(argv)
    args.save_steps, args.save_minutes = _save_every(args.save_every)
    _check(args)
    if "window12" in Path(args.pretrained_swin_weights).name:
        args.window = 12
    return args


def _save_every(text: str) -> tuple[int, float]:
    """Steps and minutes of ``--save-every``; 0 is never."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", text)
    if text and (not match or not float(text.removesuffix("m"))):
        raise InputError(f"--save-every {text}: give steps, like 500, or minutes, like 10m")
    return (int(match[1] or 0), float(match[2] or 0)) if match else (0, 0.0)


# What may differ in a run that is continued without its numbers becoming others.
FREE_TO_CHANGE = """
    resume device workers pin_mem print_freq output_dir local_rank refer_data_root
    image_root data_cache bert_tokenizer ck_bert pretrained_swin_weights model_id save_every
    save_steps save_minutes save_error stop_after eval_every tensorboard deterministic
    nonfinite split splits ddp_trained_weights text_from_scratch fused_adamw compile
    channels_last tf32 grad_checkpoint
"""


def compare_args(before: Any, now: argparse.Namespace) -> list[str]:
    """What a continued run's options were, where they differ and matter.

    Args:
        before: the ``args`` of the checkpoint: a dictionary, or the release's Namespace.
        now: of this run.
    """
    old = before if isinstance(before, dict) else getattr(before, "__dict__", {})
    # A stranger's file may hold anything, like tensors, that cannot simply be compared.
    old = {k: v for k, v in old.items() if v is None or isinstance(v, str | int | float)}
    new = vars(now)
    return [
        f"--{name} {old[name]}, not {new[name]}"
        for name in sorted((old.keys() & new.keys()) - set(FREE_TO_CHANGE.split()))
        if old[name] != new[name]
    ]


def parse_test(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of test.py, checked; ``splits`` is the list of ``--split``.

    Raises:
        InputError: naming the option and what it takes.
    """
    p = common_parser("Evaluate a checkpoint on one or more splits.")
    p.prog = "test.py"
    g = p.add_argument_group("beyond the published options")
    g.add_argument(
        "--eval_mode",
        choices=EVAL_MODES,
        default="each",
        help="an object's expressions: one by one (standard), joined, or predictions averaged",
    )
    g.add_argument(
        "--eval_size",
        choices=EVAL_SIZES,
        default="model",
        help="count pixels at --img_size (standard), or at the photo's own size",
    )
    g.add_argument(
        "--val_expressions",
        choices=VAL_EXPRESSIONS,
        default="all",
        help="per object; one: drawn by --seed, as after an epoch of training",
    )
    g.add_argument(
        "--results",
        default=None,
        help="JSON file (default: results_….json in ./models/<model_id>/); "
        "the tables go beside it as .md, .tex and .csv",
    )
    g.add_argument(
        "--predictions",
        nargs="?",
        const="",
        default=None,
        metavar="FILE",
        help="write every sample's masks and counts (default: predictions_….jsonl beside results)",
    )
    g.add_argument(
        "--control",
        action="store_true",
        help="evaluate also with the sentence of another object of the same picture",
    )
    args = p.parse_args(argv)
    args.splits = [s for s in args.split.split(",") if s]
    if not args.splits or len(set(args.splits)) < len(args.splits):
        raise InputError(f"--split {args.split}: give a split, or several different ones by commas")
    if args.eval_mode != "each" and args.val_expressions == "one":
        raise InputError(
            f"--eval_mode {args.eval_mode} takes all expressions of an object, "
            "--val_expressions one a single one: leave one of them out"
        )
    if not args.resume:
        raise InputError("--resume is missing: give the checkpoint to evaluate")
    _check(args)
    _name_outputs(args)
    return args


MAX_NUMBER = 2**31 - 1
HIGHEST = {"img_size": 16384, "ape": 4096, "workers": 1024}  # beyond them, memory is


def _name_outputs(args: argparse.Namespace) -> None:
    """Say where results and predictions go; each protocol has files of its own."""
    differences = protocol_of(args).differences()
    differences.pop("img_size", None)  # the checkpoint's, as a rule: it tells no two runs apart
    name = "_".join(
        [args.dataset, args.splitBy, *args.splits, *(f"{k}-{v}" for k, v in differences.items())]
    )
    folder = Path("models") / args.model_id
    args.results = args.results or str(folder / f"results_{name}.json")
    if Path(args.results).suffix in TABLE_ENDINGS:
        raise InputError(f"--results {args.results}: a table will be there; name a .json file")
    if args.predictions == "":
        args.predictions = str(Path(args.results).parent / f"predictions_{name}.jsonl")
    if args.predictions is not None and Path(args.predictions) == Path(args.results):
        raise InputError(f"--predictions {args.predictions}: --results is there; name another file")


def _check(args: argparse.Namespace) -> None:
    """Fill in what depends on the model, and refuse values that would only fail later."""
    entry = MODELS[args.model]
    for name in ("lr", "batch_size", "val_expressions", "max_tokens"):
        if getattr(args, name, "") is None:
            setattr(args, name, getattr(entry, name))
    args.window = 12 if args.window12 else 7
    positive = ["batch_size", "epochs", "img_size", "print_freq", "lr", "eval_every", "accumulate"]
    positive.append("max_tokens")
    not_negative = [
        "workers",
        "scale_lr",
        "weight_decay",
        "ape",
        "seed",
        "lang_layers",
        "stop_after",
        "clip_grad",
    ]
    for name in (*positive, *not_negative):
        value = getattr(args, name, None)
        if value is None:
            continue
        if name in not_negative and not value >= 0:  # also catches nan
            raise InputError(f"--{name} {value}: must be 0 or more")
        if name in positive and not value > 0:
            raise InputError(f"--{name} {value}: must be above 0")
        if value > HIGHEST.get(name, MAX_NUMBER):
            raise InputError(f"--{name} {value}: must be {HIGHEST.get(name, MAX_NUMBER)} at most")
    for name in ("fusion_drop", "drop_path"):
        if not 0 <= getattr(args, name, 0.0) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be in [0, 1)")
    parse_heads(args.mha)
    variant(args)
    if not re.fullmatch(r"[\w.+-]+", args.model_id) or set(args.model_id) == {"."}:
        raise InputError(
            f"--model_id '{args.model_id}': it names files; use letters, digits, . _ + -"
        )


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :func:`lib.segmentation.build_model` that the options ask for."""
    dropout = {"model": None, "on": True, "off": False}[getattr(args, "text_dropout", "model")]
    return {
        "swin_type": args.swin_type,
        "window_size": args.window,
        "text_config": args.ck_bert,
        "mha": args.mha,
        "fusion_drop": args.fusion_drop,
        "drop_path": getattr(args, "drop_path", 0.0),
        "ape_grid": args.ape,
        "text_dropout": dropout,
        "max_tokens": args.max_tokens,
        "variant": variant(args),
    }


def parse_demo(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of demo_inference.py, checked.

    Raises:
        InputError: naming the option and what it takes.
    """
    p = common_parser("Cut out of a photo what a sentence refers to.")
    p.prog = "demo_inference.py"
    g = p.add_argument_group("photos and sentences")
    g.add_argument("--image", default="", help="a photo, or a folder of photos")
    g.add_argument("--sentence", nargs="+", default=[], help="one or more, for every photo")
    g.add_argument(
        "--list",
        default="",
        metavar="JSON",
        help='instead of both: [{"image": PATH, "sentence": TEXT or [TEXT, ...]}, ...], '
        "paths relative to the file",
    )
    g.add_argument(
        "--output", default="./demo/", help="a picture file for one overlay, otherwise a folder"
    )
    g.add_argument("--caption", action="store_true", help="write the sentence below the overlay")
    g.add_argument("--mask", action="store_true", help="also X.mask.png, 8 bits: 0 or 255")
    g.add_argument("--rle", action="store_true", help="also X.rle.json, COCO's compressed RLE")
    g.add_argument(
        "--prob", action="store_true", help="also X.prob.png, 16 bits: 65535 is certainly inside"
    )
    g.add_argument(
        "--attention",
        action="store_true",
        help="also X.attention.png, how much each pixel listens to each word, at every stage",
    )
    args = p.parse_args(argv)
    example = (
        'python demo_inference.py --image photo.jpg --sentence "the dog on the left" '
        "--resume ./checkpoints/refcoco.pth --output ./demo/"
    )
    if args.list and (args.image or args.sentence):
        raise InputError("--list names photos and sentences itself: leave out --image, --sentence")
    if not args.list and not args.image:
        raise InputError(f"--image is missing: give a photo or a folder, like {example}")
    if not args.list and not args.sentence:
        raise InputError(f"--sentence is missing: say what to cut out, like {example}")
    if not args.resume:
        raise InputError(f"--resume is missing: give the trained checkpoint, like {example}")
    _check(args)
    return args


def parse_report(
    argv: Sequence[str] | None = None, evaluated: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Arguments of tools.quickstart_report, checked; ``splits`` is the list of ``--split``.

    Args:
        argv: the command line; None for the process' own.
        evaluated: the arguments that test.py wrote into its results, as defaults.

    Raises:
        InputError: naming the option and what it takes.
    """
    p = common_parser("Print an evaluation's tables and draw some of its predictions.")
    p.prog = "python -m tools.quickstart_report"
    p.set_defaults(**(evaluated or {}))
    g = p.add_argument_group("report", "all other options default to those of the evaluation")
    g.add_argument("--results", required=True, help="the JSON file that test.py wrote")
    g.add_argument("--output", default="./quickstart/", help="folder for predictions.png")
    g.add_argument("--pictures", nargs="*", default=[], help="other pictures, to be named too")
    args = p.parse_args(argv)
    args.splits = [s for s in args.split.split(",") if s]
    if not args.splits:
        raise InputError(f"--split {args.split}: give a split to draw predictions of")
    _check(args)
    return args


def speed_options(args: argparse.Namespace) -> dict[str, bool]:
    """The keywords of :func:`lib.runtime.prepare` that the options ask for."""
    return {"channels_last": args.channels_last, "compiled": args.compile, "tf32": args.tf32}


def refer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :class:`refer.refer.REFER` that the options ask for."""
    folder = args.data_cache or default_folder(args.refer_data_root)
    return {
        "data_root": args.refer_data_root,
        "dataset": args.dataset,
        "splitBy": args.splitBy,
        "image_root": args.image_root,
        "cache": None if folder == "off" else ArrayCache(folder),
    }


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :class:`data.dataset_refer_bert.ReferDataset` that the options ask for."""
    at_photo = getattr(args, "eval_size", "model") == "original"
    return {
        "img_size": args.img_size,
        "max_tokens": args.max_tokens,
        "union_masks": args.mask_mode == "union",
        "text": args.text,
        "eval_mode": getattr(args, "eval_mode", "each"),
        "photo_masks": at_photo or getattr(args, "predictions", None) is not None,
    }


def protocol_of(args: argparse.Namespace) -> Protocol:
    """What the numbers of an evaluation mean, by test.py or after an epoch of train.py."""
    return Protocol(
        eval_mode=getattr(args, "eval_mode", "each"),
        eval_size=getattr(args, "eval_size", "model"),
        text=args.text,
        mask_mode=args.mask_mode,
        val_expressions=getattr(args, "val_expressions", "all"),
        img_size=args.img_size,
        max_tokens=args.max_tokens,
        model_tokens=MODELS[args.model].max_tokens,
    )
