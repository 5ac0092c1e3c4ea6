"""The fast forms of matmuls, window attention and decoder compute what the plain ones do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.cpu import kernels, windows
from lib.cpu.kernels import Linear, conv3x3, derived, linear
from lib.mask_predictor import MaskPredictor
from lib.swin import SwinBlock, WindowAttention
from tests.conftest import Build

Change = Callable[[nn.Linear], object]


def by_hand(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.mul_(2)


def by_optimizer(module: nn.Linear) -> None:
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.AdamW(module.parameters(), lr=0.1).step()


def by_fused_optimizer(module: nn.Linear) -> None:
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.AdamW(module.parameters(), lr=0.1, fused=True).step()


def by_inference(module: nn.Linear) -> None:
    with torch.inference_mode():
        module.weight.mul_(2)


def behind_autograds_back(module: nn.Linear) -> None:
    module.weight.data.mul_(0.99).add_(0.01)


def by_new_data(module: nn.Linear) -> None:
    module.weight.data = module.weight.data * 2


def by_new_parameter(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach() * 2)


def by_loading(module: nn.Linear) -> None:
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


def by_assigning(module: nn.Linear) -> None:
    doubled = {k: v * 2 for k, v in module.state_dict().items()}
    module.load_state_dict(doubled, assign=True)


def by_rounding(module: nn.Linear) -> None:
    module.to(torch.bfloat16).to(torch.float32)


CHANGES = [by_hand, by_optimizer, by_fused_optimizer, by_inference, by_new_data]
CHANGES += [behind_autograds_back]
CHANGES += [by_new_parameter, by_loading, by_assigning, by_rounding]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_derived_follows_the_weight(change: Change) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    made: list[int] = []

    def double() -> Tensor:
        made.append(1)
        return module.weight.detach() * 2

    for expected in (1, 1):
        assert torch.equal(derived("x", (module.weight,), double), module.weight * 2)
        assert len(made) == expected
    change(module)
    assert not torch.equal(before, module.weight)
    assert torch.equal(derived("x", (module.weight,), double), module.weight * 2)
    assert torch.equal(derived("x", (module.weight,), double), module.weight * 2)
    assert len(made) == 2


def test_a_write_behind_autograds_back_is_seen_after_eval(build_nano: Build) -> None:
    model = build_nano().eval()
    table = model.get_parameter("backbone.layers.0.blocks.0.attn.relative_position_bias_table")
    attention = model.get_submodule("backbone.layers.0.blocks.0.attn")
    assert isinstance(attention, WindowAttention)
    with torch.inference_mode():
        before = attention.bias().clone()
        table.data.add_(1)
        model.eval()
        torch.testing.assert_close(attention.bias(), before + 1)


def test_a_transposed_buffer_is_another() -> None:
    attention = WindowAttention(8, 3, 2)
    with torch.no_grad():
        bias = attention.bias()
        attention.relative_position_index = attention.relative_position_index.T
        assert torch.equal(attention.bias(), bias.transpose(1, 2))


def test_nothing_of_it_is_in_copies_pickles_and_state_dicts() -> None:
    block = SwinBlock(8, 2, 3).eval()
    names, size = list(block.state_dict()), len(pickle.dumps(block))
    with torch.inference_mode():
        block(torch.randn(1, 5, 5, 8))
    assert list(block.state_dict()) == names
    assert len(pickle.dumps(block)) == size
    twin = copy.deepcopy(block)
    with torch.no_grad():
        twin.attn.relative_position_bias_table.add_(1)
        torch.testing.assert_close(twin.attn.bias(), block.attn.bias() + 1)


def test_it_goes_with_the_weight() -> None:
    module = nn.Linear(3, 2)
    before = len(kernels._derived)
    derived("x", (module.weight,), lambda: 1)
    assert len(kernels._derived) == before + 1
    del module
    assert len(kernels._derived) == before


def same_gradients(
    own: Tensor, expected: Tensor, wanted: Sequence[Tensor], rtol: float, atol: float
) -> None:
    """Compare what flows back from two results to the same inputs."""
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(own, wanted, weights),
        torch.autograd.grad(expected, wanted, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("outputs", [200, 500])
@pytest.mark.parametrize("many", [0, 10**9])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(600, 384), (2, 30, 20, 384), (1, 1, 384), (0, 384)])
def test_linear(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    bias: bool,
    gelu: bool,
    many: int,
    outputs: int,
) -> None:
    """Values and gradients, in float32 however small."""
    monkeypatch.setattr(kernels, "LARGE", 0)
    monkeypatch.setattr(kernels, "MANY", many)
    torch.manual_seed(0)
    module = nn.Linear(384, outputs, bias=bias)
    x = torch.randn(shape, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        y = F.linear(x, module.weight, module.bias)
        return F.gelu(y) if gelu else y

    own, expected = linear(x, module.weight, module.bias, gelu), plain(x)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(own, expected, **close)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, module.weight, module.bias, gelu), plain(x), **close)
    same_gradients(own, expected, (x, *module.parameters()), rtol=1e-3, atol=1e-4)


def test_linear_of_a_convolutions_weight_and_of_strided_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "LARGE", 0)
    x = torch.randn(2, 16, 30).transpose(1, 2)
    conv = nn.Conv1d(16, 8, 1)
    expected = conv(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(linear(x, conv.weight, conv.bias), expected)


@torch.inference_mode()
def test_linear_in_bfloat16_follows_its_weight() -> None:
    module, x = Linear(64, 32), torch.randn(10, 64)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        exact = F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
        by_hand(module)


def test_linear_of_another_type_is_the_plain_one() -> None:
    module, x = Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", ["x", "weight", "neither"])
def test_convolution(
    monkeypatch: pytest.MonkeyPatch, order: torch.memory_format, frozen: str
) -> None:
    """Values and gradients, in strips of which the last is a shorter one."""
    monkeypatch.setattr(kernels, "STRIP", 4)
    torch.manual_seed(0)
    x = torch.randn(2, 16, 11, 9).to(memory_format=order).requires_grad_(frozen != "x")
    weight = torch.randn(24, 16, 3, 3).to(memory_format=order).requires_grad_(frozen != "weight")
    own, expected = conv3x3(x, weight), F.conv2d(x, weight, padding=1)
    assert torch.equal(own, expected)
    wanted = [t for t in (x, weight) if t.requires_grad]
    same_gradients(own, expected, wanted, rtol=1e-4, atol=1e-4)


def blocks(window: int, shift: int, heads: int = 2) -> SwinBlock:
    torch.manual_seed(0)
    block = SwinBlock(16, heads, window, shift).double()
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.bias)
    return block


@pytest.mark.parametrize("chunk", [1, 500, 10**6])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(4, 8), (5, 11), (1, 1), (9, 4)])
def test_window_attention_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], shift: int, chunk: int
) -> None:
    """Values and every gradient, however large the pieces."""
    monkeypatch.setattr(windows, "CHUNK", chunk)
    block = blocks(window=4, shift=shift)
    x = torch.randn(3, *size, 16, dtype=torch.float64, requires_grad=True)
    wanted = (x, *block.attn.parameters())

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = block.attend(x)
        return y, torch.autograd.grad((y * y.detach().cos()).sum(), wanted)

    own, gradients = run()
    with torch.no_grad():
        assert torch.equal(block.attend(x), own)
    with kernels.plain():
        expected, plain = run()
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("frozen", [True, False])
def test_window_attention_under_autocast(frozen: bool) -> None:
    block = blocks(4, 2).float().requires_grad_(not frozen)
    x = torch.randn(2, 7, 9, 16, requires_grad=True)
    expected = block(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    (own,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(own, gradient, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("amp", [False, True])
def test_the_decoder_with_folded_norms_is_the_plain_one(amp: bool) -> None:
    torch.manual_seed(0)
    decoder = MaskPredictor((8, 16, 32, 64))
    for part in decoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    decoder.eval()
    close = {"rtol": 5e-2, "atol": 5e-2} if amp else {"rtol": 1e-4, "atol": 1e-5}

    def decode(batch: int, side: int) -> tuple[Tensor, Tensor]:
        maps = [torch.randn(batch, 8 * 2**i, side // 2**i, 12 // 2**i) for i in range(4)]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            own = decoder(maps)
            with kernels.plain():
                return own.float(), decoder(maps).float()

    for batch, side in ((2, 16), (1, 40), (2, 16)):  # its weights are packed for the first
        torch.testing.assert_close(*decode(batch, side), **close)
    with torch.no_grad():
        decoder.get_submodule("bn1_4").get_buffer("running_mean").add_(100)
    torch.testing.assert_close(*decode(2, 16), **close)


def test_a_flop_counter_sees_the_published_network(build_nano: Build) -> None:
    """Evaluation and training alike: the operators that it knows, on padded maps."""
    model = build_nano().eval()
    image, ids = torch.randn(1, 3, 64, 64), torch.ones(1, 5, dtype=torch.long)
    counted = []
    for recorded in (True, False):
        counter = FlopCounterMode(display=False)
        with torch.set_grad_enabled(recorded), counter, sdpa_kernel(SDPBackend.MATH):
            model(image, ids, ids)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
