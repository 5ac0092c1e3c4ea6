"""The command lines of train.py, test.py and demo_inference.py: flags, their checks, recipes."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import utils
from lib.errors import InputError
from lib.evaluation.protocol import (
    EVAL_MODES,
    EVAL_SIZES,
    MASK_MODES,
    NO_TARGET_PIXELS,
    TEXTS,
    VAL_EXPRESSIONS,
    Protocol,
)
from lib.lavt import parse_heads
from lib.losses import parse_losses
from lib.runtime import AMP
from lib.segmentation import MODELS
from lib.swin import SWIN_SIZES
from lib.training.optim import NORM_DECAY, PUBLISHED_LANG_LAYERS
from lib.variants import CHOICES, Variant
from refer.datasets import dataset_info
from refer.images import MAX_PIXELS

T = TypeVar("T")

TABLE_ENDINGS = (".md", ".tex", ".csv")
RECIPES = Path(__file__).parent / "recipes"
RECIPE_ENDING = ".args"
SCRIPTS = ("train.py", "test.py", "demo_inference.py")


# ---- parser and recipes ----


class Parser(utils.Parser):
    """A parser that also reads recipes, and replaces ``--fast`` by what it stands for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, with the flags of ``--fast`` and of recipes before the others, which win."""
        words = expand_recipes(sys.argv[1:] if args is None else args, self.prog)
        parsed = super().parse_known_args(words, namespace)
        if getattr(parsed[0], "fast", ""):
            from lib.fast import describe, fast_flags  # needed for this flag only

            flags = fast_flags(parsed[0].device, self.prog, utils.environment_number("LOCAL_RANK"))
            parsed = super().parse_known_args([*flags, *words], namespace)
            parsed[0].fast = describe(flags, vars(parsed[0]))
        return parsed


def expand_recipes(words: Sequence[str], script: str) -> list[str]:
    """Replace recipes by their flags, put before those of the command line, which win.

    Args:
        words: of the command line. ``@FILE`` is a recipe if FILE ends in ``.args`` or it is the
            first word; elsewhere it is a value, such as an expression.
        script: whose command line it is, like ``train.py``.

    Raises:
        InputError: no such recipe, or a line in it that is no flag.
    """
    named = [
        i
        for i, word in enumerate(words)
        if word.startswith("@") and (i == 0 or word.endswith(RECIPE_ENDING))
    ]
    flags = [flag for i in named for flag in read_recipe(words[i][1:], script)]
    return flags + [word for i, word in enumerate(words) if i not in named]


def read_recipe(name: str, script: str) -> list[str]:
    """The words of a recipe that are for a script.

    A recipe has one flag and its value per line; ``#`` begins a comment. Lines below ``[train.py]``
    are for that script alone, until the next such line; those before the first are for all.

    Args:
        name: a file, relative to the working directory or to the project's folder.
        script: see :func:`expand_recipes`.

    Raises:
        InputError: it cannot be read, or a line is no flag.
    """
    path = next((p for p in (Path(name), RECIPES.parent / name) if p.is_file()), None)
    if path is None:
        raise InputError(f"no recipe {name}: there are {', '.join(list_recipes())}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"the recipe {path} cannot be read: {e}") from e
    words: list[str] = []
    section = script
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if heading := re.fullmatch(r"\s*\[(.+)\]\s*", line):
            section = heading[1]
            if section not in (script, *SCRIPTS):
                raise InputError(f"{where}: [{section}] is none of {', '.join(SCRIPTS)}")
            continue
        try:
            flag = shlex.split(line, comments=True)
        except ValueError as e:
            raise InputError(f"{where}: {e}, in: {line.strip()}") from e
        if flag and not flag[0].startswith("-"):
            raise InputError(f"{where}: a flag begins with --, not: {line.strip()}")
        words += flag if section == script else []
    return words


def list_recipes() -> list[str]:
    """The project's recipes, as written on a command line."""
    return sorted(f"@{RECIPES.name}/{p.name}" for p in RECIPES.glob(f"*{RECIPE_ENDING}"))


# ---- flags ----


def _lang_layers(text: str) -> int | None:
    if text != "all" and not text.isdecimal():
        raise InputError(f"--lang_layers {text}: give a number of BERT layers, or all")
    return None if text == "all" else int(text)


# Flags whose default is the checkpoint's value, in scripts that use a trained model.
OF_INPUT = ("img_size", "max_tokens", "text")
OF_DATA = ("mask_mode", "dataset", "splitBy")
OF_BERT = ("ck_bert", "bert_tokenizer")
OF_MODEL = (
    *("model", "swin_type", "window12", "mha", "fusion_drop", "ape", "no_target_head"),
    *CHOICES,
)
FROM_CHECKPOINT = (*OF_MODEL, *OF_BERT, *OF_INPUT, *OF_DATA)


def add_model_flags(p: Parser) -> None:
    """The flags that make a model."""
    add = p.add_argument_group("model").add_argument
    add("--model", default="lavt", choices=list(MODELS))
    add("--swin_type", default="base", choices=list(SWIN_SIZES))
    add("--window12", action="store_true", help="Swin windows of 12, not 7")
    add("--mha", default="", help="heads of the four PWAMs, a-b-c-d ('': 1-1-1-1)")
    add("--fusion_drop", type=float, default=0.0, help="dropout in PWAM")
    add("--ape", type=int, default=0, metavar="N", help="absolute position embedding, N x N")
    add("--bert_tokenizer", default="bert-base-uncased", help="hub name or folder")
    add("--ck_bert", default="bert-base-uncased", help="hub name or folder of BERT")
    add("--ddp_trained_weights", action="store_true", help="accepted and ignored")
    add = p.add_argument_group("ablations (lavt, lavt_one); defaults are published").add_argument
    helps = {
        "lang_path": "off: V' = V, fused features go to the decoder only",
        "gate": "activation of the language gate; none: no activation, off: V' = V + F",
        "fusion": "PWAM, or the mean word feature joined to every pixel",
        "pwam_attention": "softmax over the words, or a sigmoid per word",
        "pwam_combine": "pixels times gathered words, or gathered words alone",
        "pwam_norm": "norm of PWAM's queries and output",
        "decoder_features": "F: before the gate; V: V' = V + gate(F) * F",
    }
    for name, text in helps.items():
        add(f"--{name}", choices=CHOICES[name], default=CHOICES[name][0], help=text)


def take_from_checkpoint(p: Parser) -> Parser:
    """Leave flags :data:`FROM_CHECKPOINT` that are not given out of what is parsed."""
    for action in p._actions:
        if action.dest in FROM_CHECKPOINT:
            action.default = argparse.SUPPRESS
            action.help = f"{action.help or action.dest} (default: the checkpoint's)"
    return p


def common_parser(description: str, *, trained: bool = False) -> Parser:
    """The flags of the published scripts, which all scripts take alike.

    Args:
        description: of the script.
        trained: it uses a trained model: those :data:`FROM_CHECKPOINT` that are not given are
            missing in what is parsed, until :mod:`tools.trained` adds them.
    """
    p = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_flags(p)
    add = p.add_argument_group("data").add_argument
    add("--dataset", default="refcoco", help="a folder of the data root; train.py: several, a,b")
    add("--splitBy", default="unc", help="unc; umd or google for refcocog; one for each dataset")
    add("--split", default="test", help="test.py: a split, or several: val,testA")
    add("--refer_data_root", default="./refer/data/", help="REFER data root")
    add("--image_root", default=None, help="folder of the images, if elsewhere")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="upper limit of an image's pixels")
    add("--data_cache", help=argparse.SUPPRESS)  # of earlier versions; ignored
    add("--mask_mode", choices=MASK_MODES, default="release", help="see docs/evaluation.md")
    add("--text", choices=TEXTS, default="raw", help="expressions as written, or cleaned")
    add("--max_tokens", type=int, help="upper limit of word pieces (20; crossvlt: 21)")
    add("--img_size", type=int, default=480, help="side of the square input, pixels")
    add("-b", "--batch_size", type=int, help="per process (8; crossvlt: 6)")
    add("-j", "--workers", type=int, default=8, help="loader processes, per process")
    add("--pin_mem", action="store_true", help="pinned host memory")
    add = p.add_argument_group("run").add_argument
    add("--model_id", default="lavt", help="name of the run: ./models/<model_id>/")
    add("--output_dir", default="./checkpoints/", help="folder of the checkpoints")
    add("--resume", default="", help="checkpoint; train.py resumes it (auto: the newest)")
    add("--device", default="cuda:0", help="the CPU is used if there is no CUDA")
    add("--print_freq", type=int, default=10, help="steps between log lines")
    add("--fast", action="store_const", const="auto", default="", help="flags fastest on --device")
    add("--amp", default="off", choices=AMP, help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--channels_last", action="store_true", help="memory format of convolutions")
    add("--tf32", action="store_true", help="float32 matmuls of a GPU in TF32")
    off: dict[str, Any] = {"action": "store_false", "default": argparse.SUPPRESS}
    for name in ("pin_mem", "compile", "channels_last", "tf32"):
        add(f"--no_{name}", dest=name, **off, help="takes it out of --fast")
    add("--accelerate", choices=("auto", "off"), default="auto", help="kernels for AVX-512")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    add = p.add_argument_group("training").add_argument
    add(
        "--pretrained_swin_weights",
        default="",
        help="ImageNet Swin; window12 in its name means --window12",
    )
    add("--epochs", type=int, default=40, help="passes over the references")
    add("--lr", type=float, help="initial learning rate (5e-5; crossvlt: 3e-5)")
    add("--wd", "--weight_decay", dest="weight_decay", type=float, default=1e-2, help="of AdamW")
    add("--amsgrad", action="store_true", help="AdamW's AMSGrad variant")
    if not trained:
        p.set_defaults(no_target_head=False)  # a flag of train.py alone
    return take_from_checkpoint(p) if trained else p


def add_no_target_pixels(p: Parser) -> None:
    """The flag of train.py and test.py for datasets with expressions of no target."""
    what = "grefcoco: a predicted mask of fewer pixels, or of none, means that there is no target "
    what += f"({NO_TARGET_PIXELS}; of a model with --no_target_head: what its head says)"
    p.add_argument("--no_target_pixels", type=int, metavar="N", help=what)


def variant(args: argparse.Namespace) -> Variant:
    """The ablation that the flags ask for.

    Raises:
        InputError: flags that exclude each other.
    """
    return Variant(**{name: getattr(args, name) for name in CHOICES})


def add_methods(p: argparse.ArgumentParser) -> None:
    """Add the flags of what train.py offers beyond the published recipes, all off by default."""
    add = p.add_argument_group("better training: see docs/training.md").add_argument
    add("--maskris", action="store_true", help="learn from masked images and expressions, too")
    add("--maskris_weight", type=float, default=0.5, help="of the loss without masks")
    add("--maskris_ratio", type=float, default=0.75, help="part of an image that is masked")
    add("--maskris_patch", type=int, default=32, help="side of masked patches, pixels")
    add("--maskris_text", type=float, default=0.15, help="part of the words that are masked")
    add("--mosaic", type=float, default=0.0, metavar="P", help="2 x 2 mosaics with probability P")
    add("--mosaic_directions", action="store_true", help="keep to left, right, top and bottom")
    add("--sched", default="poly", choices=("poly", "cosine"), help="of the learning rate")
    add("--min_lr", type=float, default=0.0, help="the last learning rate")
    add("--warmup_steps", type=int, default=0, help="steps in which the learning rate grows")
    add("--warmup_start", type=float, default=1e-3, help="the first learning rate, as part of --lr")
    add(
        "--backbone_lr_scale",
        type=float,
        default=1.0,
        help="of --lr, for Swin's and BERT's weights",
    )
    add("--model_ema", action="store_true", help="evaluate and save a moving average of weights")
    add("--model_ema_decay", type=float, default=0.9998, help="of a step")
    add("--model_ema_warmup", action="store_true", help="less decay in early steps")
    add("--wandb", nargs="?", const="lavt", metavar="PROJECT", help="track in Weights & Biases")


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of train.py, checked.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = common_parser("Train a referring image segmentation model.")
    p.prog = "train.py"
    add = p.add_argument_group("beyond the published flags").add_argument
    add("--loss", default="ce", help="ce, dice or dice_sum, or several: ce:0.9,dice:0.1")
    what = "--lr is for BASE samples a step: scale it in proportion (0: do not)"
    add("--scale_lr", type=int, default=0, metavar="BASE", help=what)
    add_no_target_pixels(p)
    add("--no_target_head", action="store_true", help="lavt, lavt_one: learn if there is a target")
    add("--spread_no_target", action="store_true", help="samples without target evenly spread")
    add("--drop_path", type=float, default=0.3, help="rate of the last Swin block")
    add(
        "--lang_layers",
        type=_lang_layers,
        default=PUBLISHED_LANG_LAYERS,
        metavar="N|all",
        help="train the first N BERT layers, or all of BERT with its embeddings",
    )
    what = "norms and biases with weight decay: none, all, all but the backbone's norms, or biases "
    what += "alone (embeddings have none, either)"
    add("--norm_decay", choices=NORM_DECAY, default="published", help=what)
    add(
        "--text_dropout",
        choices=("model", "on", "off"),
        default="model",
        help="BERT's dropout while training (model: off for lavt, on for lavt_one)",
    )
    add("--text_from_scratch", action="store_true", help="load no BERT weights")
    what = "start a new run with all weights of a checkpoint, of train.py or published"
    add("--init_from", default="", metavar="FILE", help=what)
    add("--val_split", default="val", help="split evaluated while training")
    add("--val_expressions", choices=VAL_EXPRESSIONS, help="of a reference (one; crossvlt: all)")
    add("--eval_every", type=int, default=1, metavar="N", help="epochs between validations")
    add("--stop_after", type=int, default=0, metavar="N", help="stop after N epochs (0: do not)")
    add(
        "--save_every",
        default="",
        metavar="N|Nm",
        help="save every N steps, or N minutes, besides after each epoch",
    )
    what = "if a checkpoint cannot be written (full disk): stop, or train on and try again"
    add("--save_error", choices=("stop", "continue"), default="stop", help=what)
    what = "at a loss or gradient that is not finite: stop, or skip the step"
    add("--nonfinite", choices=("stop", "skip"), default="stop", help=what)
    what = "limit of all gradients' norm (0: none)"
    add("--clip_grad", type=float, default=0.0, metavar="NORM", help=what)
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step")
    add("--grad_checkpoint", action="store_true", help="less memory: compute Swin blocks twice")
    add("--fused_adamw", help=argparse.SUPPRESS)  # of earlier versions; ignored
    add("--deterministic", action="store_true", help="the same bits in every run")
    add("--tensorboard", action="store_true", help="also write models/<model_id>/tensorboard/")
    add_methods(p)
    args = p.parse_args(argv)
    args.save_steps, args.save_minutes = _save_every(args.save_every)
    parse_losses(args.loss)  # raises an error for what is none
    check_methods(args, p)
    check_args(args)
    if args.init_from and args.resume not in ("", "auto"):
        raise InputError(
            "--resume goes on with a run, --init_from starts a new one: give one of the two"
        )
    fresh = not args.init_from and args.resume in ("", "auto")
    if fresh and args.text_from_scratch and args.lang_layers is not None:
        raise InputError(
            f"--text_from_scratch --lang_layers {args.lang_layers}: BERT's embeddings would be "
            "random and never trained; give --lang_layers all, or leave out --text_from_scratch"
        )
    if "window12" in Path(args.pretrained_swin_weights).name:
        args.window = 12  # as in the release
    return args


def _save_every(text: str) -> tuple[int, float]:
    """Steps and minutes of ``--save_every``; 0 for none."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", text)
    if text and (not match or not float(text.removesuffix("m"))):
        raise InputError(f"--save_every {text}: give steps, like 500, or minutes, like 10m")
    return (int(match[1] or 0), float(match[2] or 0)) if match else (0, 0.0)


def parse_test(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of test.py, to be completed by the checkpoint; ``splits`` lists ``--split``.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = common_parser("Evaluate a checkpoint on one or more splits.", trained=True)
    p.prog = "test.py"
    add = p.add_argument_group("beyond the published flags").add_argument
    add(
        "--eval_mode",
        choices=EVAL_MODES,
        default="each",
        help="an object's expressions: one by one (standard), joined, or predictions averaged",
    )
    add(
        "--eval_size",
        choices=EVAL_SIZES,
        default="model",
        help="count pixels at --img_size (standard), or at the image's original size",
    )
    add_no_target_pixels(p)
    add(
        "--val_expressions",
        choices=VAL_EXPRESSIONS,
        default="all",
        help="per reference; one: drawn by --seed, as after an epoch of training",
    )
    add(
        "--results",
        help="JSON file (default: results_….json in ./models/<model_id>/); tables go beside it",
    )
    add(
        "--predictions",
        nargs="?",
        const="",
        metavar="FILE",
        help="write every sample's masks and counts (default: predictions_….jsonl)",
    )
    add(
        "--control",
        action="store_true",
        help="also evaluate with the expression of another object of the same image",
    )
    args = p.parse_args(argv)
    args.splits = [s for s in args.split.split(",") if s]
    if not args.splits or len(set(args.splits)) < len(args.splits):
        raise InputError(
            f"--split {args.split}: give one split, or several different ones separated by commas"
        )
    if args.eval_mode != "each" and args.val_expressions == "one":
        raise InputError(
            f"--eval_mode {args.eval_mode} needs all expressions of a reference, "
            "--val_expressions one draws a single one: give one of the two flags"
        )
    if not args.resume:
        raise InputError("--resume is missing: give the checkpoint to evaluate")
    check_given(args)
    check_names(args)
    return args


def check_names(args: argparse.Namespace) -> None:
    """Raise an error for impossible names of the outputs of test.py."""
    if Path(args.results or "").suffix in TABLE_ENDINGS:
        raise InputError(f"--results {args.results}: name a .json file; the tables go beside it")
    if args.predictions and args.results and Path(args.predictions) == Path(args.results):
        raise InputError(
            f"--predictions {args.predictions}: that is the file of --results; name another one"
        )


# ---- checks ----

POSITIVE = ("batch_size", "epochs", "img_size", "print_freq", "lr", "eval_every", "accumulate")
NOT_NEGATIVE = (
    *("workers", "scale_lr", "weight_decay", "ape", "seed", "lang_layers", "stop_after"),
    "no_target_pixels",
)
MAX_NUMBER = 2**31 - 1
UPPER_LIMITS = {"img_size": 16384, "ape": 4096, "workers": 1024}
SWITCHES = ("maskris", "mosaic", "model_ema")  # each has flags that begin with its name
UP_TO_ONE = (
    *("maskris_weight", "maskris_ratio", "maskris_text"),
    *("mosaic", "warmup_start", "model_ema_decay"),
)
FROM_ZERO = ("warmup_steps", "min_lr", "backbone_lr_scale", *UP_TO_ONE)


def check_args(args: argparse.Namespace) -> None:
    """Fill in what depends on the model, and reject values that would only fail later."""
    entry = MODELS[args.model]
    for name in ("lr", "batch_size", "val_expressions", "max_tokens"):
        if getattr(args, name, "") is None:
            setattr(args, name, getattr(entry, name))
    args.window = 12 if args.window12 else 7
    variant(args)  # raises an error for flags that exclude each other
    check_given(args)
    _follow_dataset(args)


def check_methods(args: argparse.Namespace, p: argparse.ArgumentParser) -> None:
    """Reject values of :func:`add_methods` that have no meaning or would only fail later.

    Raises:
        InputError: naming the flag and what it takes.
    """
    for name in FROM_ZERO:
        value, most = getattr(args, name), 1 if name in UP_TO_ONE else 2**31
        if not 0 <= value <= most:  # also rejects nan
            limit = "in [0, 1]" if most == 1 else "0 or more"
            raise InputError(f"--{name} {value}: must be {limit}")
    if args.maskris_patch < 1:
        raise InputError(f"--maskris_patch {args.maskris_patch}: must be above 0")
    for name, value in vars(args).items():
        switch = next((s for s in SWITCHES if name.startswith(f"{s}_")), None)
        if switch and value != p.get_default(name) and not getattr(args, switch):
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(f"{given} has no meaning without --{switch}")
    if args.warmup_start != p.get_default("warmup_start") and not args.warmup_steps:
        raise InputError(
            f"--warmup_start {args.warmup_start} has no meaning without --warmup_steps"
        )
    if args.model_ema_decay == 1:
        raise InputError("--model_ema_decay 1: the average would never change: must be below 1")
    if args.wandb is not None and not ("wandb" in sys.modules or find_spec("wandb")):
        raise InputError("--wandb needs a package: pip install wandb")


def parts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(dataset, splitBy) of each part of ``--dataset a,b --splitBy x,y``.

    Raises:
        InputError: their numbers differ, or a part is named twice.
    """
    names, split_bys = args.dataset.split(","), args.splitBy.split(",")
    given = f"--dataset {args.dataset} --splitBy {args.splitBy}"
    if len(names) != len(split_bys) or (names[1:] and not all(names + split_bys)):
        raise InputError(
            f"{given}: give one splitBy for each dataset, like "
            "--dataset refcoco,refcocog --splitBy unc,umd"
        )
    pairs = list(zip(names, split_bys, strict=True))
    if len(set(pairs)) < len(pairs):
        raise InputError(f"{given}: a dataset is named twice")
    return pairs


def _follow_dataset(args: argparse.Namespace) -> None:
    """Set the flags that a dataset decides; of several, the first, which validates.

    Raises:
        InputError: a flag that has no meaning for the dataset.
    """
    pairs = parts(args)
    for name, split_by in pairs:
        only = dataset_info(name).split_by
        if only and split_by not in (only, "unc"):  # the flag's default
            raise InputError(f"--splitBy {split_by}: {name} has {only} alone")
    args.splitBy = ",".join(dataset_info(name).split_by or split_by for name, split_by in pairs)
    kinds = [dataset_info(name).metrics for name, _ in pairs]
    pixels = getattr(args, "no_target_pixels", None)
    if kinds[0] != "generalised" and pixels is not None:
        raise InputError(f"--no_target_pixels {pixels} has no meaning but with --dataset grefcoco")
    if "generalised" not in kinds and args.no_target_head and "save_steps" in args:  # train.py
        raise InputError("--no_target_head is for --dataset grefcoco alone")
    if kinds[0] == "generalised" and getattr(args, "no_target_pixels", 0) is None:
        args.no_target_pixels = "head" if args.no_target_head else NO_TARGET_PIXELS


def check_given(args: argparse.Namespace) -> None:
    """Reject values that would only fail later, among the flags that were given."""
    for name in (*POSITIVE, "max_tokens", "max_pixels", *NOT_NEGATIVE, "clip_grad"):
        value = getattr(args, name, None)
        if value is None:
            continue
        if name in (*NOT_NEGATIVE, "clip_grad"):
            if not value >= 0:  # also rejects nan
                raise InputError(f"--{name} {value}: must be 0 or more")
        elif not value > 0:
            raise InputError(f"--{name} {value}: must be above 0")
        if value > (limit := UPPER_LIMITS.get(name, MAX_NUMBER)):
            raise InputError(f"--{name} {value}: must be {limit} at most")
    for name in ("fusion_drop", "drop_path"):
        if not 0 <= getattr(args, name, 0.0) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be in [0, 1)")
    parse_heads(getattr(args, "mha", ""))
    if not re.fullmatch(r"[\w.+-]+", args.model_id) or set(args.model_id) == {"."}:
        raise InputError(
            f"--model_id '{args.model_id}': it names files; use letters, digits, . _ + -"
        )


# Flags that a resumed run may change without a warning: not settings of the training itself.
FREE_TO_CHANGE = """
    resume device workers pin_mem print_freq output_dir local_rank refer_data_root
    image_root max_pixels data_cache bert_tokenizer ck_bert pretrained_swin_weights model_id
    save_every save_steps save_minutes save_error stop_after eval_every tensorboard deterministic
    nonfinite split splits ddp_trained_weights text_from_scratch fused_adamw compile
    channels_last tf32 fast grad_checkpoint accelerate vocabulary init_from batch_size accumulate
    wandb wandb_id
"""


# Flags whose values are part of the optimizer's state, so those of a checkpoint are used.
IN_OPTIMIZER_STATE = {
    *("lr", "scale_lr", "backbone_lr_scale", "weight_decay", "norm_decay", "amsgrad"),
}


def compare_args(before: Mapping[str, Any], now: argparse.Namespace) -> list[str]:
    """A line for each flag that differs between a checkpoint and the run that resumes it.

    Args:
        before: flags that the checkpoint was trained with.
        now: of this run.
    """
    names = before.keys() & vars(now).keys() - set(FREE_TO_CHANGE.split())
    return [
        f"--{name} {getattr(now, name)} is not used when resuming: "
        f"the checkpoint's {before[name]} is"
        if name in IN_OPTIMIZER_STATE
        else differs(name, before, now)
        for name in sorted(names)
        if before[name] != getattr(now, name)
    ]


def differs(name: str, before: Mapping[str, Any], now: argparse.Namespace) -> str:
    """The line for a flag that is not as in training; arguments of :func:`compare_args`."""
    return f"--{name} {getattr(now, name)}: the checkpoint was trained with {before[name]}"


# ---- from flags to keywords ----


def select(kind: type[T], args: argparse.Namespace, **others: Any) -> T:
    """A dataclass whose fields have the values of the flags of the same names.

    Args:
        kind: the dataclass.
        args: of the command line; fields without a flag keep their defaults.
        others: fields that no flag gives.
    """
    names = {field.name for field in fields(kind)} - others.keys()  # type: ignore[arg-type]
    return kind(**{k: v for k, v in vars(args).items() if k in names}, **others)


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :func:`lib.segmentation.build_model`."""
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
        "no_target_head": args.no_target_head,
        "variant": variant(args),
        "accelerate": args.accelerate == "auto",
    }


def speed_options(args: argparse.Namespace) -> dict[str, bool]:
    """The keywords of :func:`lib.runtime.prepare`."""
    return {"channels_last": args.channels_last, "compiled": args.compile, "tf32": args.tf32}


def refer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :class:`refer.refer.REFER`; of several datasets, those of the first."""
    dataset, split_by = parts(args)[0]
    return {
        "data_root": args.refer_data_root,
        "dataset": dataset,
        "splitBy": split_by,
        "image_root": args.image_root,
        "max_pixels": args.max_pixels,
    }


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :class:`data.dataset_refer_bert.ReferDataset`."""
    original = getattr(args, "eval_size", "model") == "original"
    return {
        "img_size": args.img_size,
        "max_tokens": args.max_tokens,
        "union_masks": args.mask_mode == "union",
        "text": args.text,
        "eval_mode": getattr(args, "eval_mode", "each"),
        "original_masks": original or getattr(args, "predictions", None) is not None,
    }


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The evaluation protocol of test.py, or of train.py's validation."""
    facts: dict[str, Any] = {"model_tokens": MODELS[args.model].max_tokens}
    if masks := dataset_info(parts(args)[0][0]).mask_mode:
        facts |= {"mask_mode": masks, "dataset_masks": masks}
    return select(Protocol, args, **facts)
