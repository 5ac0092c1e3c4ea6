"""Whole models under torch.compile, and with SyncBatchNorm."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from lib.errors import InputError
from lib.losses import cross_entropy
from lib.model import Segmenter
from lib.runtime import compile_module
from lib.swin import SWIN_SIZES, SwinSize
from tests.conftest import Build

MODELS = ("lavt", "lavt_one", "crossvlt")


def build(build_nano: Build, name: str) -> Segmenter:
    """Without dropout, so that two runs are comparable."""
    torch.manual_seed(0)
    width = 32 if name == "crossvlt" else 8  # CrossVLT's heads are 64 wide
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWIN_SIZES, "shallow", SwinSize(width, (2, 1, 1, 1), (1, 2, 4, 8)))
        model = build_nano(name, swin_type="shallow", drop_path=0.0)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for option in ("dropout", "dropout_prob"):
            if isinstance(getattr(part, option, None), float):
                setattr(part, option, 0.0)
    return model.train()


def run(model: Segmenter) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step."""
    g = torch.Generator().manual_seed(1)
    terms = model.losses(
        torch.randn(2, 3, 40, 36, generator=g),
        torch.randint(1, 60, (2, 6), generator=g),
        torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        torch.randint(0, 2, (2, 40, 36), generator=g),
        cross_entropy,
    )
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(compiled: Segmenter, eager: Segmenter) -> None:
    """Loss, and gradients relative to the largest element of each."""
    (loss, own), (expected, gradients) = run(compiled), run(eager)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close = 1e-2 * gradient.abs().max().item() + 1e-5
        torch.testing.assert_close(own[name], gradient, rtol=0, atol=close, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_one_graph(name: str, build_nano: Build) -> None:
    model = build(build_nano, name)
    compiled = copy.deepcopy(model)
    names = list(compiled.state_dict())
    compiled.compile(backend="aot_eager", fullgraph=True)
    if name == "crossvlt":  # whose losses do not come from forward()
        compiled.encode = torch.compile(  # type: ignore[method-assign]
            compiled.encode, backend="aot_eager", fullgraph=True
        )
    same(compiled, model)
    assert list(compiled.state_dict()) == names


def test_lavt_compiled_by_inductor(build_nano: Build) -> None:
    model = build(build_nano, "lavt")
    compiled = copy.deepcopy(model)
    try:
        compile_module(compiled)
    except InputError:
        pytest.skip("no C++ compiler")
    same(compiled, model)


@pytest.mark.parametrize("name", MODELS)
def test_models_with_synchronised_batch_norms(name: str, build_nano: Build) -> None:
    model = build(build_nano, name)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6
    state = {k: v.clone() for k, v in model.state_dict().items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert all(isinstance(converted.get_submodule(n), nn.SyncBatchNorm) for n in norms)
    assert not [n for n, m in converted.named_modules() if re.match(r"BatchNorm", type(m).__name__)]
    assert list(converted.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in converted.state_dict().items())
    with torch.no_grad():
        ids = torch.ones(1, 4, dtype=torch.int64)
        assert converted.eval()(torch.randn(1, 3, 32, 32), ids, ids).shape == (1, 2, 32, 32)
