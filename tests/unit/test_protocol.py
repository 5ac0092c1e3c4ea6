"""Every protocol's counts against plain numpy, from the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.transforms import normalize
from lib.evaluation.evaluator import EvalConfig, SamplePrediction, evaluate
from lib.evaluation.protocol import Protocol, at_original_size, tag, warning
from refer import REFER
from tests.by_hand import Bools, Floats, averaged, counts, resized
from tests.refer_files import TINY_BERT, default_instances, make_ref, write_root
from utils import DistInfo

SIZE = 24


class Stub(nn.Module):
    """Logits that depend on every pixel and word, far quicker than a network."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # batch that was seen

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.largest = max(self.largest, len(image))
        words = (input_ids * attention_mask).sum(1).double()[:, None, None]
        x = torch.linspace(0, 3, image.shape[-1], dtype=torch.float64)
        waves = torch.sin(x[None, :, None] * (1 + words % 7) + words) * torch.cos(x * (words % 5))
        inside = waves + 0.4 * image.double().mean(1)
        return torch.stack([0.3 * waves, inside], dim=1).float()


def inside(logits: Floats) -> tuple[Bools, Floats]:
    """Mask and probability (H, W) of (K, 2, H, W)."""
    probability = averaged(logits)
    # A tie within rounding would make the comparison a matter of luck.
    assert (np.abs(probability - 0.5) > 1e-6).all()
    return probability > 0.5, probability


def nearest(mask: Bools, size: int) -> Bools:
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in mask.shape)
    return mask[rows][:, columns]


@pytest.fixture(scope="module")
def refer(tmp_path_factory: pytest.TempPathFactory) -> REFER:
    """Four objects, ten expressions; one image is smaller than the model's input, one larger."""
    refs = [
        make_ref(1, 11, 101, "train", ["left square", "the red one", "a"]),
        make_ref(2, 12, 101, "train", ["right square"]),
        make_ref(3, 13, 102, "train", ["small", "the large one of all", "top", "top left"]),
        make_ref(4, 14, 102, "train", ["blue", "!!!"]),
    ]
    instances = default_instances()
    instances["images"][1] |= {"width": 50, "height": 40}
    big = [[10.0, 5.0, 30.0, 5.0, 30.0, 35.0], [15.0, 3.0, 45.0, 3.0, 45.0, 25.0, 20.0, 25.0]]
    instances["annotations"][2]["segmentation"] = big
    root = write_root(tmp_path_factory.mktemp("protocols"), refs, instances)
    result = REFER(root, "refcoco", "unc")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(result.image_path(102))
    return result


def dataset(refer: REFER, mode: str, union: bool = False) -> ReferDataset:
    return ReferDataset(
        refer,
        "train",
        load_tokenizer(TINY_BERT),
        SIZE,
        eval_mode=mode,
        union_masks=union,
        original_masks=True,
    )


def evaluated(
    data: ReferDataset, batch_size: int, original: bool, model: Stub | None = None
) -> tuple[list[list[int]], list[SamplePrediction]]:
    predictions: list[SamplePrediction] = []
    config = EvalConfig(batch_size, eval_size="original" if original else "model")
    info = DistInfo(0, 1, torch.device("cpu"))
    everything = list(range(len(data)))
    result = evaluate(model or Stub(), data, everything, config, info, predictions.append)
    return np.stack(result, axis=1).tolist(), predictions


@pytest.mark.parametrize("union", [False, True], ids=["release", "union"])
@pytest.mark.parametrize("original", [False, True], ids=["model", "original"])
@pytest.mark.parametrize("mode", ["each", "cat", "mean"])
def test_counts_against_numpy(refer: REFER, mode: str, original: bool, union: bool) -> None:
    data = dataset(refer, mode, union)
    table, predictions = evaluated(data, 3, original)
    assert [prediction.sample for prediction in predictions] == list(range(len(data)))
    for index, (record, prediction) in enumerate(zip(data.records, predictions, strict=True)):
        covered = refer.getMask(refer.Refs[record.ref_id])["mask"]
        truth = covered > 0 if union else covered == 1
        sample = data[index]
        rows = sample["input_ids"].reshape(-1, 20)[: len(record.expressions)]
        masks = sample["attention_mask"].reshape(-1, 20)[: len(record.expressions)]
        image = normalize(sample["image"])[None]
        logits = np.concatenate(
            [
                Stub()(image, i[None], m[None]).numpy().astype(np.float64)
                for i, m in zip(rows, masks, strict=True)
            ]
        )
        full, probability = inside(resized(logits, *truth.shape))
        small, _ = inside(logits)
        expected = counts(full, truth) if original else counts(small, nearest(truth, SIZE))
        assert table[index] == [*expected]
        assert (prediction.intersection, prediction.union) == expected
        np.testing.assert_array_equal(coco_mask.decode(prediction.mask), full)
        np.testing.assert_array_equal(coco_mask.decode(prediction.ground_truth), truth)
        assert prediction.score == pytest.approx(
            probability[full].mean() if full.any() else 0, abs=1e-6
        )


def test_some_masks_of_the_stub_are_neither_empty_nor_full(refer: REFER) -> None:
    """Otherwise the comparison above would compare little."""
    table, predictions = evaluated(dataset(refer, "mean"), 2, True)
    parts = [coco_mask.decode(prediction.mask).mean() for prediction in predictions]
    assert sum(0.05 < share < 0.95 for share in parts) > len(parts) / 2
    assert any(inter > 0 for inter, _ in table)


@pytest.mark.parametrize("original", [False, True], ids=["model", "original"])
@pytest.mark.parametrize("mode", ["each", "cat", "mean"])
def test_batch_size_does_not_matter(refer: REFER, mode: str, original: bool) -> None:
    data = dataset(refer, mode)
    result = [evaluated(data, size, original) for size in (1, 2, 5, 100)]
    assert result[0] == result[1] == result[2] == result[3]


def test_an_averaged_sample_takes_no_larger_batches(refer: REFER) -> None:
    data = dataset(refer, "mean")
    assert max(len(record.expressions) for record in data.records) > 2
    model = Stub()
    evaluated(data, 2, False, model)
    assert model.largest == 1  # on a CPU


def test_one_expression_is_the_same_sample_in_every_mode(tmp_path: Path) -> None:
    """Also at ties: an average of one is not rounded."""
    refs = [make_ref(1, 11, 101, "train", ["left"]), make_ref(2, 12, 101, "train", ["the red one"])]
    root = REFER(write_root(tmp_path, refs), "refcoco", "unc")
    for original in (False, True):
        result = [evaluated(dataset(root, mode), 2, original) for mode in ("each", "cat", "mean")]
        assert result[0] == result[1] == result[2]


def test_an_object_without_expressions_is_no_sample(tmp_path: Path) -> None:
    refs = [make_ref(1, 11, 101, "train", []), make_ref(2, 12, 101, "train", ["a", "b"])]
    root = REFER(write_root(tmp_path, refs), "refcoco", "unc")
    for mode, samples in (("each", 2), ("cat", 1), ("mean", 1)):
        data = dataset(root, mode)
        assert len(data) == samples
        assert {record.ref_id for record in data.records} == {2}


def test_labels() -> None:
    assert Protocol().label == "standard"
    assert Protocol().is_standard
    assert Protocol(max_tokens=21, model_tokens=21).is_standard
    other = Protocol(eval_mode="cat", eval_size="original", max_tokens=30)
    assert other.label == "eval_mode=cat eval_size=original max_tokens=30"
    assert not other.is_standard
    assert other.as_dict()["eval_mode"] == "cat"
    assert other.as_dict()["img_size"] == 480
    assert "model_tokens" not in other.as_dict()
    assert Protocol(img_size=448, text="sent").label == "text=sent img_size=448"
    assert (tag("standard"), warning("standard")) == ("", "")
    assert tag(other.label) == f" [{other.label}]"
    assert warning(other.label) == f"NOT the standard protocol: {other.label}"


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(),
        Protocol(img_size=56),
        Protocol(eval_mode="mean", text="sent"),
        Protocol(eval_size="original"),
    ],
)
def test_label_of_counts_from_masks(protocol: Protocol) -> None:
    """As if it had been evaluated at the original size."""
    choices = protocol.choices() | {"eval_size": "original"}
    assert at_original_size(protocol.label) == Protocol(**choices).label
