"""Images and masks bit for bit as the release prepares them (golden/preprocessing.*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.transforms import as_tensor, normalize, resize_image, resize_mask
from refer.masks import draw_components, run_lengths

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "preprocessing.json").read_text())["cases"]
SAMPLES = 2048


def make_image(width: int, height: int, seed: int) -> Image.Image:
    """Ramps and noise, after the golden files' formula."""
    y, x = np.mgrid[:height, :width]
    ramps = [x * 255 // (width - 1), y * 255 // (height - 1), (x + 2 * y) * 3 % 256]
    noise = np.random.RandomState(seed).randint(-20, 21, size=(height, width, 3))
    return Image.fromarray((np.stack(ramps, axis=2) + noise).clip(0, 255).astype(np.uint8))


def make_mask(width: int, height: int) -> np.ndarray:
    """A disc, after the golden files' formula."""
    y, x = np.mgrid[:height, :width]
    radius = min(height, width) // 4
    return (y - height // 2 - 3) ** 2 + (x - width // 3) ** 2 <= radius**2


def thin(values: np.ndarray) -> np.ndarray:
    return values.ravel()[:: max(1, values.size // SAMPLES)][:SAMPLES]


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "preprocessing.npz") as content:
        return dict(content)


@pytest.mark.parametrize("name", CASES)
def test_image(name: str, stored: dict[str, np.ndarray]) -> None:
    case = CASES[name]
    img = make_image(case["width"], case["height"], case["seed"])
    assert np.asarray(img).sum(axis=(0, 1)).tolist() == case["input_sum"]
    resized = as_tensor(resize_image(img, 480))
    assert resized.sum(dim=(1, 2)).tolist() == case["resized_uint8_sum"]
    hwc = resized.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(thin(hwc), stored[f"{name}_uint8_sample"])
    result = normalize(resized[None])[0]
    np.testing.assert_array_equal(thin(result.numpy()), stored[f"{name}_image_sample"])
    sums = result.double().sum(dim=(1, 2))
    np.testing.assert_allclose(sums, case["norm_sum"], rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_mask(name: str, stored: dict[str, np.ndarray]) -> None:
    case = CASES[name]
    height, width = case["height"], case["width"]
    drawn = make_mask(width, height)
    assert drawn.sum() == case["input_mask_sum"]
    components = draw_components(run_lengths(drawn), height, width, "a disc")
    mask = resize_mask(components == 1, 480).numpy()
    assert mask.sum() == case["mask_sum"]
    expected = np.unpackbits(stored[f"{name}_mask_bits"])[: 480 * 480].reshape(480, 480)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(mask.sum(axis=1), stored[f"{name}_mask_row_sums"])


def every_value() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)


def test_normalize_equals_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms.functional")
    pixels = every_value()
    img = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = transforms.normalize(transforms.to_tensor(img), mean, std)
    assert torch.equal(normalize(pixels), expected.expand(2, -1, -1, -1))
