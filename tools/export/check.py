"""The check of an exported model: its logits and masks against those of the model itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import utils
from bert import encode
from data.transforms import as_tensor, normalize, resize_image
from lib.checkpoint.rebuild import Trained
from lib.errors import InputError
from lib.model import Segmenter
from lib.predictor import open_upright

# A runtime takes (image, input_ids, attention_mask) and gives the logits.
Run = Callable[[Tensor, Tensor, Tensor], Tensor]

IMAGES = Path(__file__).parents[2] / "tests/fixtures/refer_cc0/images/mscoco/images/train2014"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_IMAGES = 4
EXPRESSIONS = (
    "the dog on the left",
    "man in a red shirt",
    "second from right",
    "the large white object behind the small one that is in front of the people at the very left",
    "sky",
)
# Other kernels sum float32 numbers in another order, which changes the logits by about 1e-5 of the
# largest; a wrong weight or operation changes them by more than 1e-2. Pixels whose two logits are
# that near to each other may change sides.
LOGITS_TOLERANCE = 1e-3  # of the largest absolute logit
MIN_IOU = 0.99  # of the masks of all samples together


@dataclass(frozen=True)
class Row:
    """A sample of the check.

    Attributes:
        batch: size of the batch that it was computed in.
        image, expression: of the sample.
        difference: the largest of the logits, absolute.
        largest: the largest absolute logit of the model itself.
        intersection, union: pixels of the two masks.
    """

    batch: int
    image: str
    expression: str
    difference: float
    largest: float
    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Of the two masks; 1 where both are empty."""
        return self.intersection / self.union if self.union else 1.0


@dataclass(frozen=True)
class Samples:
    """Inputs of the check, N of each, with the logits (N, 2, S, S) of the model itself."""

    names: list[tuple[str, str]]  # image and expression
    inputs: tuple[Tensor, Tensor, Tensor]
    expected: Tensor

    def rows(self, run: Run, batches: Sequence[int]) -> list[Row]:
        """Run an exported model on all samples, in batches of each size."""
        rows: list[Row] = []
        count = len(self.names)
        # The last batch is filled up with the first samples.
        work = [
            (size, [(start + i) % count for i in range(size)])
            for size in batches
            for start in range(0, count, size)
        ]
        for size, chosen in utils.progress(work, "exported model", 0):
            with torch.no_grad():
                logits = run(*(t[chosen] for t in self.inputs)).cpu()
            expected = self.expected[chosen]
            if logits.shape != expected.shape:
                raise InputError(
                    f"the exported model gives logits of the shape {tuple(logits.shape)}, "
                    f"not {tuple(expected.shape)}"
                )
            rows += [self._row(size, i, logits[k]) for k, i in enumerate(chosen)]
        return rows

    def _row(self, batch: int, index: int, logits: Tensor) -> Row:
        expected = self.expected[index]
        masks = [each.argmax(0).bool() for each in (logits, expected)]
        return Row(
            batch,
            *self.names[index],
            difference=float((logits - expected).abs().max()),
            largest=float(expected.abs().max()),
            intersection=int((masks[0] & masks[1]).sum()),
            union=int((masks[0] | masks[1]).sum()),
        )


def read_samples(trained: Trained, folder: str | Path) -> Samples:
    """Samples of the first images of a folder, each with its own expression.

    Raises:
        InputError: no image there.
    """
    path = Path(folder)
    files = sorted(p for p in path.glob("*") if p.suffix.lower() in ENDINGS)[:MAX_IMAGES]
    if not files:
        raise InputError(f"no image in {path}: give a folder of images by --images")
    size, max_tokens = trained.settings["img_size"], trained.settings["max_tokens"]
    pixels = [normalize(as_tensor(resize_image(open_upright(f), size))) for f in files]
    count = max(len(files), len(EXPRESSIONS))
    image = torch.stack([pixels[i % len(files)] for i in range(count)])
    texts = [EXPRESSIONS[i % len(EXPRESSIONS)] for i in range(count)]
    inputs = image, *encode(trained.tokenizer, texts, max_tokens)
    names = [(files[i % len(files)].name, texts[i]) for i in range(count)]
    return Samples(names, inputs, eager_logits(trained.model, inputs))


@torch.no_grad()
def eager_logits(model: Segmenter, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The logits (N, 2, S, S) of the model itself, one sample at a time."""
    one_by_one = list(zip(*(t.split(1) for t in inputs), strict=True))
    return torch.cat([model(*each) for each in utils.progress(one_by_one, "model", 0)])


def compare(samples: Samples, run: Run, batches: Sequence[int]) -> dict[str, Any]:
    """Compare an exported model with the model itself, and print the table.

    Args:
        samples: from :func:`read_samples`.
        run: of the exported model.
        batches: the sizes of batches to run it with.

    Returns:
        What was compared, for the result file.

    Raises:
        InputError: logits or masks differ by more than the tolerance.
    """
    rows = samples.rows(run, batches)
    print(f"{'batch':>5}  {'difference':>10}  {'of largest':>10}  {'IoU':>7}  image, expression")
    for row in rows:
        share = row.difference / max(row.largest, 1e-30)
        numbers = f"{row.batch:>5}  {row.difference:>10.2e}  {share:>10.2e}  {row.iou:>7.4f}"
        print(f"{numbers}  {row.image}, {row.expression[:40]}")
    sys.stdout.flush()
    differences = np.array([row.difference for row in rows])
    worst = float(differences.max() / max(*(row.largest for row in rows), 1e-30))
    union = sum(row.union for row in rows)
    iou = sum(row.intersection for row in rows) / union if union else 1.0
    if not (worst <= LOGITS_TOLERANCE and iou >= MIN_IOU):  # also of nan
        raise InputError(
            f"the exported model differs from the model itself: logits by {worst:.1e} of the "
            f"largest ({LOGITS_TOLERANCE:.0e} is allowed), masks have an IoU of {iou:.4f} "
            f"({MIN_IOU} is required); no file was written"
        )
    return {
        "largest_difference": worst,
        "iou": iou,
        "tolerance": {"largest_difference": LOGITS_TOLERANCE, "iou": MIN_IOU},
        "rows": [asdict(row) | {"iou": row.iou} for row in rows],
        "environment": utils.environment(),
    }


def tensor_of(array: npt.NDArray[Any]) -> Tensor:
    """An array as a tensor; a runtime's own may be read-only."""
    return torch.from_numpy(np.array(array))
