"""Whole models under torch.compile, and with SyncBatchNorm.

Torch's own compiler (inductor) takes minutes for a model on a CPU: test_speed.py has a block.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from data.loaders import prepare_batch
from lib.evaluation.evaluator import expression_logits
from lib.losses import WeightedLosses, cross_entropy
from lib.model import Objective, Segmenter
from lib.runtime import compile_module, recompute_blocks
from lib.swin import SWIN_SIZES, SwinSize
from lib.training.maskris import MaskRIS
from lib.training.methods import Methods
from lib.training.optim import build_optimizer, poly_schedule
from lib.training.steps import Step, StepOptions, train_steps
from tests.conftest import Build

CPU = torch.device("cpu")
MODELS = ("lavt", "lavt_one", "crossvlt")


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Sizes that another test compiled for would make this one's dynamic."""
    torch.compiler.reset()


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


def batches(number: int, size: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of different images and of expressions of different words and lengths."""
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randint(0, 256, (size, 3, 40, 36), generator=g, dtype=torch.uint8),
            "input_ids": torch.randint(1, 60, (size, 6), generator=g),
            "attention_mask": (
                torch.arange(6) < torch.randint(2, 7, (size, 1), generator=g)
            ).long(),
            "target": torch.randint(0, 2, (size, 40, 36), generator=g),
            "index": torch.arange(size),
        }
        for _ in range(number)
    ]


def train(objective: Objective, options: StepOptions, number: int = 2) -> list[Step]:
    optimizer = build_optimizer([{"params": list(objective.parameters())}], 1e-4)
    schedule = poly_schedule(optimizer, 10)
    data = batches(number * options.accumulate, 2)
    return list(train_steps(objective, data, optimizer, schedule, CPU, options))


def evaluate(model: Segmenter, amp: str) -> list[Tensor]:
    """Logits of two batches, the last one smaller."""
    data = [prepare_batch(batches(1, size, seed=size)[0], CPU) for size in (2, 1)]
    with torch.inference_mode():
        return [x for batch in data for x in expression_logits(model.eval(), batch, amp, fill=2)]


WAYS = [
    ("lavt", StepOptions(), True),
    ("lavt_one", StepOptions(accumulate=2, clip_grad=1.0), False),
    ("crossvlt", StepOptions("bf16"), False),
]


@pytest.mark.parametrize(
    ("name", "options", "recompute"), WAYS, ids=["grad checkpoint", "accumulate", "bf16"]
)
def test_two_graphs_serve_training_and_evaluation(
    name: str, options: StepOptions, recompute: bool, build_nano: Build
) -> None:
    """Whole graphs, none compiled twice, with eager's numbers: the operators are the same ones.

    Tolerances, relative: losses 1e-4, norms of gradients 1e-3, logits with the same weights 1e-3 of
    the largest; with bfloat16 1e-2, 1e-1 and 5e-2: graphs round to it at other places.
    """
    model = build(build_nano, name)
    if recompute:
        recompute_blocks(model)
    eager = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("aot_eager")
    objective = Objective(model, cross_entropy)
    names = list(objective.state_dict())
    compile_module(objective, graphs)
    compile_module(model, graphs)
    close = [1e-2, 1e-1, 5e-2] if options.amp == "bf16" else [1e-4, 1e-3, 1e-3]
    for before in (1, 2):  # graphs, of training alone and of both
        steps = train(objective, options)
        for step, other in zip(steps, train(Objective(eager, cross_entropy), options), strict=True):
            torch.testing.assert_close(step.loss, other.loss, rtol=close[0], atol=0)
            torch.testing.assert_close(step.grad_norm, other.grad_norm, rtol=close[1], atol=0)
        assert graphs.frame_count == before
        eager.load_state_dict(model.state_dict())
        for one, other in zip(
            evaluate(model, options.amp), evaluate(eager, options.amp), strict=True
        ):
            largest = other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=close[2] * largest)
        assert graphs.frame_count == 2
    assert list(objective.state_dict()) == names


def test_two_graphs_serve_both_passes_of_maskris(build_nano: Build) -> None:
    """Masks are drawn outside the graphs; tolerances as above."""
    maskris = MaskRIS(Methods(maskris_patch=4), mask_id=4, special_ids=(0,), vocabulary=60)
    model = build(build_nano, "lavt")
    eager = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("aot_eager")
    objective = maskris.objective(model, WeightedLosses({"ce": 1.0}))
    compile_module(objective, graphs)
    options = StepOptions(maskris=maskris)
    runs = []
    for each in (objective, maskris.objective(eager, WeightedLosses({"ce": 1.0}))):
        torch.manual_seed(3)
        runs.append(train(each, options, number=3))
    for step, other in zip(*runs, strict=True):
        torch.testing.assert_close(step.loss, other.loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(step.grad_norm, other.grad_norm, rtol=1e-3, atol=0)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("fill", [3, 0])
def test_a_smaller_batch(fill: int, build_nano: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled it needs no other graph. The meta device stands for a GPU."""
    monkeypatch.setattr("lib.evaluation.evaluator.autocast", lambda *_: torch.no_grad())
    model = build(build_nano, "lavt").eval().to("meta")
    compile_module(model, "eager")

    def logits(size: int) -> list[Tensor]:
        batch = prepare_batch(batches(1, size)[0], torch.device("meta"))
        return expression_logits(model, batch, "off", fill)

    assert len(logits(3)) == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        if fill:
            assert len(logits(2)) == 2
        else:
            with pytest.raises(RuntimeError, match="recompile"):
                logits(2)


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
