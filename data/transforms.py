"""From images and masks to tensors, bit for bit as in the release."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)


def resize_image(image: Image.Image, size: int) -> Image.Image:
    """Resize to a square, bilinear with antialiasing; the aspect ratio is not kept.

    PIL does it: a tensor's antialiased resize differs by one grey level on a fifth of the values.
    """
    return image.resize((size, size), Image.Resampling.BILINEAR)


def as_tensor(image: Image.Image) -> Tensor:
    """A copy of an RGB image: (3, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_mask(mask: npt.NDArray[np.bool_], size: int) -> Tensor:
    """Resize a mask (H, W) to a square (S, S) uint8, nearest neighbour with PIL's own rounding."""
    resized = Image.fromarray(mask.view(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized))


def normalize(image: Tensor) -> Tensor:
    """Scale pixels to [0, 1] and normalise by ImageNet's mean and deviation.

    Equal to torchvision's ToTensor and Normalize bit for bit, on any device: all operands are
    tensors, because CUDA turns a division by a Python number into a product.

    Args:
        image: (..., 3, H, W) uint8.

    Returns:
        (..., 3, H, W) float32, contiguous.
    """
    # Fake tensors, which have no content, are not kept.
    constants = _constants if type(image) is Tensor else _constants.__wrapped__
    full, mean, std = constants(image.device)
    image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return image.div_(full).sub_(mean).div_(std)


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):  # the first caller may be in it, a later one training
        full, mean, std = (
            torch.stack([torch.full((1, 1), value, device=device) for value in values])
            for values in ((255.0,), MEAN, STD)
        )
    return full, mean, std
