"""From a picture and a mask to tensors, bit for bit as the release does it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)


class Preprocess:
    """Resizes to a square, without regard to the aspect ratio.

    The picture is resized by PIL: a tensor's antialiased resize differs by one grey level on
    a fifth of the values. Pixels stay uint8, a quarter of the bytes for workers and buses;
    `normalize` does the rest on the model's device.

    Args:
        img_size: side of the square, pixels.
    """

    def __init__(self, img_size: int) -> None:
        if img_size < 1:
            raise ValueError(f"img_size must be positive, not {img_size}")
        self.img_size = img_size

    def __call__(
        self, picture: Image.Image, mask: Image.Image | npt.NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        """Both `image` and `mask`."""
        return self.image(picture), self.mask(mask)

    def square(self, picture: Image.Image) -> Image.Image:
        """Resize a picture, bilinear with antialiasing."""
        return picture.resize((self.img_size, self.img_size), Image.Resampling.BILINEAR)

    def image(self, picture: Image.Image) -> Tensor:
        """Resize a picture, bilinear with antialiasing.

        Args:
            picture: RGB.

        Returns:
            (3, S, S) uint8, the channels side by side in memory.
        """
        return as_tensor(self.square(picture))

    def mask(self, mask: Image.Image | npt.NDArray[np.bool_]) -> Tensor:
        """Resize a mask, nearest neighbour.

        Args:
            mask: (H, W) bool, or a picture of mode L or P with the values 0 and 1.

        Returns:
            (S, S) int64 in {0, 1}.
        """
        if not isinstance(mask, Image.Image):
            mask = Image.fromarray(mask.astype(np.uint8))
        square = mask.resize((self.img_size, self.img_size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(square, np.int64))


def as_tensor(picture: Image.Image) -> Tensor:
    """A copy of an RGB picture: (3, H, W) uint8, the channels side by side in memory."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@lru_cache(maxsize=4096)
def nearest(size: int, img_size: int) -> npt.NDArray[np.int64]:
    """Which pixels PIL's nearest-neighbour resize takes, along one axis.

    PIL is asked, for its rounding is its own: it resizes a picture of the numbers 0 to size - 1.

    Returns:
        (size + 1,): how many of the `img_size` pixels are taken from pixels before each.
    """
    numbers = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    taken = np.array(numbers.resize((img_size, 1), Image.Resampling.NEAREST))[0]
    return np.concatenate([[0], np.cumsum(np.bincount(taken, minlength=size))])


def normalize(image: Tensor) -> Tensor:
    """Scale pixels to [0, 1] and normalise by ImageNet's mean and deviation.

    Equal to torchvision's ToTensor and Normalize bit for bit, on any device: all operands are
    tensors there, because CUDA turns the division by a Python number into a product.

    Args:
        image: (..., 3, H, W) uint8.

    Returns:
        (..., 3, H, W) float32, channel by channel in memory.
    """
    full, mean, std = _constants(image.device)
    image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return image.div_(full).sub_(mean).div_(std)


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):  # the first caller may be in it, a later one training
        full = torch.full((1, 1, 1), 255.0, device=device)
        mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        std = torch.tensor(STD, device=device).view(3, 1, 1)
    return full, mean, std
