"""The order of training samples that Ref-ZOM's release uses; for --spread_no_target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.dataset_refer_bert import ReferDataset
from data.mixed import MixedDataset
from lib.errors import InputError


def spreader(dataset: ReferDataset | MixedDataset) -> Callable[[list[int]], list[int]]:
    """The function that spreads samples without target evenly among the others.

    After each block of floor(#others / #without) others comes one without; what is left of the
    others comes last. If there are more without than others, they come first. The order within
    both stays as drawn.

    Raises:
        InputError: every sample of the dataset has a target.
    """
    no_target = dataset.no_target
    if not no_target.any():
        raise InputError(f"--spread_no_target: every sample of {dataset!r} has a target")

    def spread(drawn: list[int]) -> list[int]:
        order = np.asarray(drawn, np.int64)
        without, others = order[no_target[order]], order[~no_target[order]]
        block = len(others) // max(1, len(without))
        places = block * np.arange(1, len(without) + 1)
        return np.insert(others, places, without).tolist()

    return spread
