"""The trained model of ``--resume``, and the flags that its checkpoint decides."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from args import (
    FROM_CHECKPOINT,
    OF_BERT,
    OF_INPUT,
    OF_MODEL,
    check_args,
    check_names,
    common_parser,
    differs,
    protocol_of,
    speed_options,
)
from lib import runtime
from lib.checkpoint.rebuild import Trained, open_trained
from lib.errors import InputError
from lib.evaluation.protocol import NO_TARGET_PIXELS
from utils import log


def open_model(
    args: argparse.Namespace, device: torch.device, compared: Sequence[str] = OF_INPUT
) -> Trained:
    """Rebuild the model of a checkpoint on a device; complete the arguments from it.

    Logs what the model is. Logs each setting that is not as in its training: that changes its
    predictions, or what they are compared with.

    Args:
        args: of :func:`args.parse_test` or the like.
        device: of the model.
        compared: the settings to compare.

    Raises:
        InputError: see :func:`lib.checkpoint.rebuild.open_trained`.
    """
    trained = open_trained(args.resume, given(args), accelerate=args.accelerate == "auto")
    settings = dict(trained.settings)
    trained_on = settings.get("dataset", "")
    wanted = getattr(args, "dataset", trained_on)
    if "," in wanted and "dataset" in compared:
        raise InputError(f"several datasets, {wanted}: give one of them by --dataset")
    if wanted != trained_on:
        settings.pop("splitBy", None)  # that of another dataset
    recorded = {name: settings[name] for name in trained.recorded & settings.keys()}
    if wanted in trained_on.split(","):
        recorded.pop("dataset", None)
    complete(args, settings, recorded)
    if args.fast:
        log.info("--fast: %s", args.fast)
    runtime.prepare(trained.model.to(device), **speed_options(args))
    log.info("%s", trained.summary)
    for name in compared:
        if name in recorded and recorded[name] != getattr(args, name):
            log.warning("warning: %s", differs(name, recorded, args))
    return trained


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The given flags as :func:`lib.checkpoint.rebuild.open_trained` takes them."""
    names = {*OF_MODEL, *OF_BERT, "max_tokens"} - {"window12"}
    flags = {name: value for name, value in vars(args).items() if name in names}
    return flags | ({"window": 12} if getattr(args, "window12", False) else {})


def complete(
    args: argparse.Namespace, settings: Mapping[str, Any], recorded: Mapping[str, Any]
) -> None:
    """Fill in the flags that were not given: the checkpoint's values, else the published defaults.

    Args:
        args: of :func:`args.parse_test` or the like.
        settings: of :class:`lib.checkpoint.rebuild.Trained`.
        recorded: those of them that the file tells.
    """
    usual = common_parser("")
    for name in FROM_CHECKPOINT:
        if name not in OF_BERT and not hasattr(args, name):
            setattr(args, name, settings.get(name, usual.get_default(name)))
    args.window12 = settings["window"] == 12
    for name in ("img_size", "max_tokens"):
        setattr(args, f"trained_{name}", recorded.get(name))
    check_args(args)
    args.window = settings["window"]


def name_outputs(args: argparse.Namespace) -> None:
    """Name the files of results and predictions of test.py; each protocol has its own."""
    differences = protocol_of(args).differences()
    differences.pop("img_size", None)  # usually follows from the checkpoint
    if differences.get("no_target_pixels") == ("head" if args.no_target_head else NO_TARGET_PIXELS):
        del differences["no_target_pixels"]
    others = [f"{k}-{v}" for k, v in differences.items()]
    name = "_".join([args.dataset, args.splitBy, *args.splits, *others])
    folder = Path("models") / args.model_id
    args.results = args.results or str(folder / f"results_{name}.json")
    if args.predictions == "":
        args.predictions = str(Path(args.results).parent / f"predictions_{name}.jsonl")
    check_names(args)
