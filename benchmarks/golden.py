"""Weights and inputs by formula, for numbers measured from the official release (tests/golden)."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig

from lib.lavt import LAVT
from lib.segmentation import build_model

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def read_json(name: str) -> Any:
    """A file of tests/golden."""
    return json.loads((GOLDEN / name).read_text())


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a float parameter or buffer of the published state dict, float32."""
    key = name.removeprefix("text_encoder.")
    seed = zlib.crc32(key.encode())
    n = np.random.RandomState(seed).standard_normal(shape)
    *_, module, leaf = ["", *key.split(".")]
    norm_like = re.fullmatch(r".*norm\d*|bn\d\w*", module.lower()) is not None
    fan_in = int(np.prod(shape[1:]))
    if leaf == "relative_position_bias_table":
        value = 0.2 * n
    elif leaf == "running_mean":
        value = 0.1 * n
    elif leaf in ("running_var", "temp"):
        value = 1 + 0.1 * np.abs(n)
    elif leaf == "weight" and module.endswith("embeddings"):
        value = 0.05 * n
    elif leaf == "weight" and len(shape) == 1:
        value = 1 + 0.1 * n
    elif leaf == "bias":
        value = (0.1 if norm_like else 0.02) * n
    elif leaf == "weight" and ("attention.self." in key or module == "dense"):
        value = 0.02 * n
    else:
        value = np.sqrt((2 if len(shape) == 4 else 1) / fan_in) * n
    return value.astype(np.float32)


def fill(model: nn.Module) -> None:
    """Give every float tensor of ``model`` its formula value; integer buffers stay."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))


def build(case: dict[str, Any], **options: Any) -> LAVT:
    """The model of a case of lavt_cases.json in eval mode, formula weights and head bias set."""
    model = build_model(
        case["model"],
        swin_type=case["swin"],
        window_size=case["window"],
        mha=case["mha"],
        text_config=BertConfig(),
        **options,
    )
    fill(model)
    if "head_bias" in case:
        with torch.no_grad():
            model.get_parameter("classifier.conv1_1.bias").copy_(torch.tensor(case["head_bias"]))
    return model.eval()


def image(seed: int, shape: list[int]) -> Tensor:
    """The picture of a case, (B, 3, H, W) float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def tokens(seed: int, word_pieces: list[int], max_len: int = 20) -> tuple[Tensor, Tensor]:
    """The ids and mask of a case, each (B, max_len) int64."""
    r = np.random.RandomState(seed)
    ids = np.zeros((len(word_pieces), max_len), np.int64)
    for row, k in zip(ids, word_pieces, strict=True):
        full = [101, *r.randint(1000, 30522, size=k), 102][:max_len]
        row[: len(full)] = full
    return torch.from_numpy(ids), torch.from_numpy((ids != 0).astype(np.int64))


def inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Picture, ids and mask of a case of lavt_cases.json."""
    return (
        image(case["image_seed"], case["image_shape"]),
        *tokens(case["token_seed"], case["word_pieces"]),
    )


def sample(x: Tensor | np.ndarray, k: int) -> np.ndarray:
    """The first k values of the flattened tensor at a stride of size // k."""
    flat = np.asarray(x).reshape(-1)
    return flat[:: max(1, flat.size // k)][:k]


def discs(specs: list[list[int]], size: tuple[int, int]) -> Tensor:
    """Targets of discs [cy, cx, r], (B, H, W) int64."""
    y, x = np.mgrid[: size[0], : size[1]]
    return torch.from_numpy(
        np.stack([((y - cy) ** 2 + (x - cx) ** 2 <= r * r) for cy, cx, r in specs]).astype(np.int64)
    )
