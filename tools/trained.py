"""The trained model of ``--resume``, for the scripts that use one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from args import OF_INPUT, compare_use, complete, given, speed_options
from lib import runtime
from lib.checkpoint.rebuild import Trained, open_trained
from utils import log


def open_model(
    args: argparse.Namespace, device: torch.device, compared: Sequence[str] = OF_INPUT
) -> Trained:
    """Rebuild the model of a checkpoint on a device; complete the arguments from it.

    Logs what the model is, and each setting that is not as in its training.

    Args:
        args: of :func:`args.parse_test` or :func:`args.parse_demo`.
        device: of the model.
        compared: the settings to compare.

    Raises:
        InputError: see :func:`lib.checkpoint.rebuild.open_trained`.
    """
    trained = open_trained(args.resume, given(args), accelerate=args.accelerate == "auto")
    complete(args, trained.settings, trained.recorded)
    runtime.prepare(trained.model.to(device), **speed_options(args))
    log.info("%s", trained.summary)
    for difference in compare_use(trained.settings, args, compared):
        log.warning("warning: %s", difference)
    return trained
