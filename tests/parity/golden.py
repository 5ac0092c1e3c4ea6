"""Weights and inputs by formula, for numbers measured from the official release (tests/golden)."""

from __future__ import annotations

import json
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertConfig

from bert import build_text_encoder
from lib.lavt import LAVT
from lib.segmentation import build_model

GOLDEN = Path(__file__).parents[1] / "golden"
Array = npt.NDArray[Any]


@lru_cache(maxsize=16)
def read_json(name: str) -> Any:
    """A JSON file of tests/golden; callers do not change it."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def read_arrays(name: str) -> dict[str, Array]:
    """An .npz file of tests/golden."""
    with np.load(GOLDEN / name) as file:
        return dict(file)


def weight(name: str, shape: tuple[int, ...]) -> Array:
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


def fill(model: nn.Module, skip: str | None = None) -> None:
    """Give the float tensors of ``model`` their formula values; integer buffers stay.

    Args:
        model: with the published names.
        skip: names that start so are left alone.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not (skip and name.startswith(skip)):
                tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))


@lru_cache(maxsize=1)
def text_state() -> dict[str, Tensor]:
    """The formula weights of BERT-base: seconds to draw, and the same in every case."""
    encoder = build_text_encoder(BertConfig())
    fill(encoder)
    return encoder.state_dict()


def cases() -> dict[str, dict[str, Any]]:
    """The forward cases, by letter."""
    return read_json("lavt_cases.json")


def build(case: dict[str, Any], head_bias: bool = True, **options: Any) -> LAVT:
    """The model of a case, in eval mode, with formula weights.

    Args:
        case: of :func:`cases`.
        head_bias: set the case's bias of the last convolution, so that both classes occur; the
            forward numbers were measured with it, the training numbers without.
        options: further keywords of :func:`lib.segmentation.build_model`.

    Returns:
        A model of its own, that may be changed.
    """
    model = build_model(
        case["model"],
        swin_type=case["swin"],
        window_size=case["window"],
        mha=case["mha"],
        text_config=BertConfig(),
        **options,
    )
    if not isinstance(model, LAVT):
        raise TypeError(f"{case['model']} is no LAVT")
    fill(model, skip="text_encoder.")
    model.text_encoder.load_state_dict(text_state())
    if head_bias:
        with torch.no_grad():
            model.get_parameter("classifier.conv1_1.bias").copy_(torch.tensor(case["head_bias"]))
    return model.eval()


def image(seed: int, shape: list[int]) -> Tensor:
    """The image of a case, (B, 3, H, W) float32."""
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
    """Image, ids and mask of a case of lavt_cases.json."""
    return (
        image(case["image_seed"], case["image_shape"]),
        *tokens(case["token_seed"], case["word_pieces"]),
    )


def sample(x: Tensor | Array, k: int) -> Array:
    """The first k values of the flattened tensor at a stride of size // k."""
    flat = np.asarray(x).reshape(-1)
    return flat[:: max(1, flat.size // k)][:k]


def discs(specs: list[list[int]], size: tuple[int, int]) -> Tensor:
    """Targets of discs [cy, cx, r], (B, H, W) int64."""
    y, x = np.mgrid[: size[0], : size[1]]
    return torch.from_numpy(
        np.stack([((y - cy) ** 2 + (x - cx) ** 2 <= r * r) for cy, cx, r in specs]).astype(np.int64)
    )


def draw_image(seed: int, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """The RGB image and the mask (mode P, values 0 and 1) of a case of preprocessing.json."""
    y, x = np.mgrid[:height, :width]
    clean = np.stack(
        [x * 255 // (width - 1), y * 255 // (height - 1), ((x + 2 * y) * 3) % 256], axis=-1
    )
    noise = np.random.RandomState(seed).randint(-20, 21, size=clean.shape)
    img = Image.fromarray((clean + noise).clip(0, 255).astype(np.uint8))
    disc = discs([[height // 2 + 3, width // 3, min(height, width) // 4]], (height, width))
    mask = Image.fromarray(disc[0].numpy().astype(np.uint8)).convert("L")
    mask.putpalette([0, 0, 0, 255, 255, 255])  # turns it into mode P, values unchanged
    return img, mask
