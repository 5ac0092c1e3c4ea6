"""Which pictures and sentences go through the model together, and that each gets its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib.evaluation import evaluator


class Recorder(nn.Module):
    """Answers each sentence with the value of its picture and the sum of its words."""

    def __init__(self, shares: bool) -> None:
        super().__init__()
        self.shares_pictures = shares
        self.calls: list[tuple[int, int]] = []

    def forward(
        self, image: Tensor, ids: Tensor, mask: Tensor, of_picture: Tensor | None = None
    ) -> Tensor:
        self.calls.append((len(image), len(ids)))
        if of_picture is None:
            assert len(image) == len(ids)
        else:
            assert self.shares_pictures
            image = image[of_picture]
        value = image[:, 0, 0, 0]
        return torch.stack([value, (ids * mask).sum(1).float()], 1)[:, :, None, None]


def parts_of_a_gpu(image: Tensor, owner: Tensor, most: int) -> object:
    return list(PARTS(image.to("meta"), owner, most))


PARTS = evaluator._parts


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "gpu":
        monkeypatch.setattr(evaluator, "_parts", parts_of_a_gpu)
    return request.param


def pictures(number: int) -> Tensor:
    return torch.arange(1.0, number + 1)[:, None, None, None].expand(number, 3, 4, 4)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("owner", [[0, 0, 1, 2, 2, 2], [0, 1, 2], [0, 0, 0]])
def test_a_sentence_a_sample(device: str, shares: bool, owner: list[int]) -> None:
    model = Recorder(shares)
    ids = torch.randint(1, 50, (len(owner), 5))
    batch = {"image": pictures(owner[-1] + 1), "input_ids": ids}
    batch |= {"attention_mask": torch.ones_like(ids), "of_picture": torch.tensor(owner)}
    logits, counts = evaluator.expression_logits(model, batch, "off")
    assert counts == [1] * len(owner)
    assert logits[:, 0, 0, 0].tolist() == [o + 1 for o in owner]
    assert logits[:, 1, 0, 0].tolist() == ids.sum(1).tolist()
    if device == "cpu":
        assert len(model.calls) == len(set(owner))
    else:
        seen = len(set(owner)) if shares or len(set(owner)) == len(owner) else len(owner)
        assert model.calls == [(seen, len(owner))]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("owner", [[0, 0, 1], [0, 1, 2], [0, 0, 0], None])
@pytest.mark.parametrize("counts", [[3, 1, 2], [1, 1, 1], [1, 4, 4]])
def test_sentences_side_by_side(
    device: str, shares: bool, owner: list[int] | None, counts: list[int]
) -> None:
    model = Recorder(shares)
    ids = torch.randint(1, 50, (3, 4, 5))
    of_sample = owner or [0, 1, 2]
    batch = {"image": pictures(of_sample[-1] + 1), "input_ids": ids}
    batch |= {"attention_mask": torch.ones_like(ids), "expressions": torch.tensor(counts)}
    if owner:
        batch["of_picture"] = torch.tensor(owner)
    logits, found = evaluator.expression_logits(model, batch, "off")
    assert found == counts
    wanted = [(s, k) for s, number in enumerate(counts) for k in range(number)]
    assert logits[:, 0, 0, 0].tolist() == [of_sample[s] + 1 for s, _ in wanted]
    assert logits[:, 1, 0, 0].tolist() == [int(ids[s, k].sum()) for s, k in wanted]
    assert max(sentences for _, sentences in model.calls) <= 3
