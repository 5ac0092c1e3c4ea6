"""Which images a model was trained on: sorted ids (int64) by `REFER.image_source`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from data.dataset_refer_bert import ReferDataset


def merge(*many: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The images that are in any of them."""
    names = sorted({name for seen in many for name in seen})
    return {n: torch.cat([seen[n] for seen in many if n in seen]).unique() for n in names}


def count_seen(seen: Mapping[str, Tensor], dataset: ReferDataset) -> int | None:
    """How many images of a split a model was trained on; None if its checkpoint does not tell."""
    images = np.unique(dataset.image_ids)
    ids = seen.get(dataset.refer.image_source, torch.empty(0))
    return int(np.isin(images, ids.numpy()).sum()) if seen else None
