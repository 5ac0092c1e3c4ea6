"""Which images and expressions go through the model together, and that each gets its own logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib.evaluation.evaluator import decide_mask, expression_logits


class Recorder(nn.Module):
    """Returns each expression's pixel value and sum of tokens as its two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        assert len(image) == len(ids) == len(mask)
        self.sizes.append(len(ids))
        tokens = (ids * mask).sum(1).float()
        return torch.stack([image[:, 0, 0, 0], tokens], 1)[:, :, None, None]


def images(number: int) -> Tensor:
    return torch.arange(1.0, number + 1)[:, None, None, None].expand(number, 3, 4, 4)


def test_one_expression_per_sample() -> None:
    model = Recorder()
    ids = torch.randint(1, 50, (5, 7))
    batch = {"image": images(5), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = expression_logits(model, batch, "off")
    assert [x.shape for x in logits] == [(1, 2, 1, 1)] * 5
    assert [x[0, 0].item() for x in logits] == [1, 2, 3, 4, 5]
    assert [x[0, 1].item() for x in logits] == ids.sum(1).tolist()
    assert model.sizes == [1] * 5  # on a CPU


@pytest.mark.parametrize("counts", [[3, 1, 2], [1, 1, 1], [1, 4, 4]])
def test_several_expressions_per_sample(counts: list[int]) -> None:
    model = Recorder()
    ids = torch.randint(1, 50, (3, 4, 5))
    batch = {"image": images(3), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = expression_logits(model, batch | {"expressions": torch.tensor(counts)}, "off")
    assert [len(x) for x in logits] == counts
    for sample, x in enumerate(logits):
        assert x[:, 0, 0, 0].tolist() == [sample + 1] * counts[sample]
        assert x[:, 1, 0, 0].tolist() == ids[sample, : counts[sample]].sum(1).tolist()


def test_batches_on_other_devices() -> None:
    """At most B expressions at a time; the meta device stands for a GPU."""
    sizes = []

    class Sizes(nn.Module):
        def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            sizes.append(len(ids))
            return image[:, :2]

    ids = torch.ones(4, 7, dtype=torch.long, device="meta")
    batch = {"image": images(4).to("meta"), "input_ids": ids, "attention_mask": ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.evaluation.evaluator.autocast", lambda *_: torch.no_grad())
        assert len(expression_logits(Sizes(), batch, "off")) == 4
    assert sizes == [4]


def test_a_tie_is_background_and_probabilities_are_averaged() -> None:
    one = torch.tensor([[[[0.0, 1.0, 2.0]], [[0.0, 2.0, 1.0]]]])
    assert decide_mask(one).tolist() == [[False, True, False]]
    # 0.73 and 0.38: the mean is above one half.
    two = torch.tensor([[[[0.0]], [[1.0]]], [[[0.0]], [[-0.5]]]])
    assert decide_mask(two).tolist() == [[True]]
