"""lib.cpu: an accelerated model computes what the plain one does.

Float32 kernels are used on AVX-512 only; here ``onednn_beats_mkl`` is replaced, so that they run
on any CPU with oneDNN.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib import cpu, fusion, mask_predictor, segmentation, swin
from lib.cpu import capability, kernels, modules, windows
from lib.cpu.kernels import conv3x3, linear, prepared
from lib.losses import cross_entropy
from lib.model import Segmenter
from lib.swin import SwinBlock, WindowAttention
from tests.conftest import Build

MODELS = ("lavt", "lavt_one", "crossvlt")
Change = Callable[[nn.Linear], object]

pytestmark = pytest.mark.skipif(
    not capability.onednn_has(torch.float32), reason="PyTorch without oneDNN"
)


@pytest.fixture(autouse=True)
def every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 kernels run, and for small matmuls, too."""
    monkeypatch.setattr(kernels, "onednn_beats_mkl", lambda: True)
    monkeypatch.setattr(kernels, "LARGE", 0)
    monkeypatch.setattr(kernels, "STRIP", 4)


# ---- whole models ----


def pair(build_nano: Build, name: str) -> tuple[Segmenter, Segmenter]:
    """A model with random norms, and its accelerated copy."""
    torch.manual_seed(0)
    size = "micro" if name == "crossvlt" else "nano"  # CrossVLT's heads are 64 wide
    model = build_nano(name, swin_type=size, drop_path=0.0, accelerate=False)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            part.get_buffer("running_var").uniform_(0.5, 2)
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, WindowAttention):
            nn.init.normal_(part.relative_position_bias_table)
    return model, cpu.accelerate(copy.deepcopy(model))


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    return {
        "image": torch.randn(2, 3, 52, 72, generator=g),
        "input_ids": torch.randint(1, 60, (2, 6), generator=g),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_inference_of_models(build_nano: Build, name: str, amp: bool) -> None:
    plain, fast = pair(build_nano, name)
    plain.eval(), fast.eval()
    close = {"rtol": 0.05, "atol": 0.05} if amp else {"rtol": 1e-4, "atol": 1e-5}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for _ in range(2):  # the second time with prepared weights
            torch.testing.assert_close(fast(**inputs()), plain(**inputs()), **close)


def loss_and_gradient(model: Segmenter, amp: bool = False) -> tuple[Tensor, Tensor]:
    """Of a training step; the gradients of all parameters as one float64 vector."""
    dtype = next(model.parameters()).dtype
    batch = inputs() | {"image": inputs()["image"].to(dtype)}
    target = (batch["image"][:, 0] > 0).long()
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        terms = model.losses(**batch, target=target, segmentation=cross_entropy)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.detach().double(), torch.cat([g.flatten() for g in gradients]).double()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_models(build_nano: Build, name: str, amp: bool) -> None:
    """As far from float64 as the plain model's, up to a factor of 4."""
    plain, fast = pair(build_nano, name)
    exact_loss, exact = loss_and_gradient(copy.deepcopy(plain).double())
    errors = []
    for model in (plain, fast):
        loss, gradient = loss_and_gradient(model, amp)
        errors.append((abs(loss - exact_loss), (gradient - exact).norm()))
    eps = torch.finfo(torch.bfloat16 if amp else torch.float32).eps
    assert errors[1][0] <= 4 * errors[0][0] + 8 * eps * exact_loss
    assert errors[1][1] <= 4 * errors[0][1]


@pytest.mark.parametrize("name", MODELS)
def test_accelerated_models_have_the_same_state(build_nano: Build, name: str) -> None:
    plain, fast = pair(build_nano, name)
    kinds = {type(m) for m in fast.modules()}
    assert kinds >= set(modules.ACCELERATED.values()) - {modules.TokenConv1d}
    assert not kinds & set(modules.ACCELERATED)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert repr(fast) == repr(plain)
    with torch.inference_mode():
        expected = fast.eval()(**inputs())
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        for twin in (
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            torch.load(file, weights_only=False),
        ):
            torch.testing.assert_close(twin(**inputs()), expected, rtol=1e-5, atol=1e-6)
            assert list(twin.state_dict()) == list(plain.state_dict())


def test_build_model_accelerates_where_it_pays(
    build_nano: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pays, asked in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(cpu, "pays", lambda pays=pays: pays)
        decoder = build_nano(accelerate=asked).classifier
        assert isinstance(decoder, modules.MaskPredictor) == (pays and asked)


def test_importing_the_network_does_not_import_lib_cpu() -> None:
    for module in (segmentation, swin, fusion, mask_predictor):
        assert not [n for n, v in vars(module).items() if getattr(v, "__name__", "") == "lib.cpu"]


def test_subclasses_and_parametrized_modules_are_not_exchanged() -> None:
    class Own(nn.Linear):
        pass

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    model = cpu.accelerate(nn.Sequential(Own(3, 3), normed, nn.Linear(2, 2)))
    assert [isinstance(m, modules.Linear) for m in model] == [False, False, True]


# ---- where the plain forward runs ----


def fast_block() -> tuple[SwinBlock, SwinBlock, Tensor]:
    """A plain block, its accelerated copy, and an input."""
    torch.manual_seed(0)
    block = SwinBlock(16, 2, 4, 2).eval()
    nn.init.normal_(block.attn.relative_position_bias_table)
    return block, cpu.accelerate(copy.deepcopy(block)), torch.randn(2, 7, 9, 16)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a kernel ran")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels raise."""
    for module, name in ((windows, "attend"), (kernels, "_onednn"), (kernels, "_packed")):
        monkeypatch.setattr(module, name, refuse)


def test_kernels_run_by_default(no_kernels: None) -> None:
    _, fast, x = fast_block()
    with pytest.raises(AssertionError, match="a kernel ran"):
        fast(x)


def test_compiled_blocks_are_plain(no_kernels: None) -> None:
    plain, fast, x = fast_block()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))


def test_exported_blocks_are_plain(no_kernels: None) -> None:
    plain, fast, x = fast_block()
    exported = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(exported(x), plain(x))


def test_traced_blocks_are_plain(no_kernels: None) -> None:
    plain, fast, x = fast_block()
    with torch.no_grad():
        traced = torch.jit.trace(fast, x, check_trace=False)
        torch.testing.assert_close(traced(x), plain(x))


def test_blocks_under_functorch_are_plain(no_kernels: None) -> None:
    plain, fast, x = fast_block()

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(fast, parameters, x[None]).sum()

    parameters = dict(fast.named_parameters())
    result = torch.func.vmap(torch.func.grad(total), (None, 0))(parameters, x)
    expected = torch.autograd.grad(plain(x[1:]).sum(), list(plain.parameters()))
    for one, other in zip(result.values(), expected, strict=True):
        torch.testing.assert_close(one[1], other, rtol=1e-3, atol=1e-4)


def test_forward_mode_differentiation_is_plain(no_kernels: None) -> None:
    _, fast, _ = fast_block()
    x, tangent = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    with forward_ad.dual_level():
        y = fast.mlp.fc1(forward_ad.make_dual(x, tangent))
        result = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(result, tangent @ fast.mlp.fc1.weight.T)


def test_hooks_of_parts_run() -> None:
    plain, fast, x = fast_block()
    for block in (plain, fast):
        for name in ("attn", "mlp.fc1"):
            block.get_submodule(name).register_forward_hook(lambda m, args, out: 2 * out)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


def test_other_modules_in_the_place_of_parts() -> None:
    class LowRank(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x) + 1

    plain, fast, x = fast_block()
    for block in (plain, fast):
        block.attn.qkv.__class__ = block.mlp.fc1.__class__ = LowRank
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_flop_counter_counts_the_plain_network(build_nano: Build) -> None:
    plain, fast = pair(build_nano, "lavt")
    counted = []
    for model in (plain, fast):
        for recorded in (True, False):
            counter = FlopCounterMode(display=False)
            with torch.set_grad_enabled(recorded), counter, sdpa_kernel(SDPBackend.MATH):
                model.eval()(**inputs())
            counted.append(counter.get_total_flops())
    assert len(set(counted)) == 1
    assert counted[0] > 0


# ---- prepared weights ----


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


def through_data(module: nn.Linear) -> None:
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


CHANGES = [by_hand, by_optimizer, by_fused_optimizer, by_inference, by_new_data, through_data]
CHANGES += [by_new_parameter, by_loading, by_assigning, by_rounding]


@pytest.mark.parametrize("change", CHANGES)
def test_prepared_weights_follow_the_weight(change: Change) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    made: list[int] = []

    def double() -> Tensor:
        made.append(1)
        return module.weight.detach() * 2

    for expected in (1, 1):
        assert torch.equal(prepared("x", (module.weight,), double), module.weight * 2)
        assert len(made) == expected
    change(module)
    assert not torch.equal(before, module.weight)
    assert torch.equal(prepared("x", (module.weight,), double), module.weight * 2)
    assert torch.equal(prepared("x", (module.weight,), double), module.weight * 2)
    assert len(made) == 2


def test_setting_the_mode_drops_prepared_weights() -> None:
    """As a write through ``.data`` to an element that is not compared needs."""
    module, x = cpu.accelerate(nn.Linear(64, 32)).eval(), torch.randn(5, 64)
    with torch.inference_mode():
        module(x)
    module.weight.data[0, 1] = 100
    with torch.inference_mode():
        expected = F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_prepared_weights_are_freed_with_the_weight() -> None:
    module = nn.Linear(3, 2)
    before = len(kernels._prepared)
    prepared("x", (module.weight,), lambda: 1)
    assert len(kernels._prepared) == before + 1
    del module
    assert len(kernels._prepared) == before


# ---- kernels ----


def same_gradients(
    own: Tensor, expected: Tensor, wanted: Sequence[Tensor], rtol: float, atol: float
) -> None:
    """Compare the gradients of two results with respect to the same inputs."""
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(own, wanted, weights),
        torch.autograd.grad(expected, wanted, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("outputs", [200, 500])
@pytest.mark.parametrize("many", [0, 10**9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(600, 384), (2, 30, 20, 384), (1, 1, 384)])
def test_linear(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool, many: int, outputs: int
) -> None:
    """Values and gradients."""
    monkeypatch.setattr(kernels, "MANY", many)
    torch.manual_seed(0)
    module = nn.Linear(384, outputs, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    own, expected = linear(x, module.weight, module.bias), module(x)
    assert own is not None
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(own, expected, **close)
    same_gradients(own, expected, (x, *module.parameters()), rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        for gelu in (False, True):
            plain = F.gelu(module(x)) if gelu else module(x)
            own = linear(x, module.weight, module.bias, gelu)
            torch.testing.assert_close(own, plain, **close)


def test_linear_of_a_convolutions_weight() -> None:
    x, conv = torch.randn(2, 30, 16), nn.Conv1d(16, 8, 1)
    expected = conv(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(linear(x, conv.weight, conv.bias), expected)


@pytest.mark.parametrize(
    "x",
    [torch.randn(5, 4, dtype=torch.float64), torch.randn(0, 4), torch.randn(4, 5).T],
    ids=["float64", "empty", "strided"],
)
def test_linear_does_not_apply(x: Tensor) -> None:
    module = nn.Linear(4, 3).to(x.dtype)
    assert linear(x, module.weight, module.bias) is None
    assert torch.equal(cpu.accelerate(copy.deepcopy(module))(x), module(x))


@torch.inference_mode()
def test_linear_in_bfloat16_follows_its_weight() -> None:
    module, x = cpu.accelerate(nn.Linear(64, 32)), torch.randn(10, 64)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        exact = F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
        by_hand(module)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", ["x", "neither"])
def test_convolution(order: torch.memory_format, frozen: str) -> None:
    """Values and gradients, in strips of which the last one is shorter."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 11, 9).to(memory_format=order).requires_grad_(frozen != "x")
    weight = torch.randn(24, 16, 3, 3).to(memory_format=order).requires_grad_()
    own, expected = conv3x3(x, weight), F.conv2d(x, weight, padding=1)
    assert own is not None
    assert torch.equal(own, expected)
    wanted = [t for t in (x, weight) if t.requires_grad]
    same_gradients(own, expected, wanted, rtol=1e-4, atol=1e-4)


def double_blocks(window: int, shift: int) -> tuple[SwinBlock, SwinBlock]:
    """A plain block in float64, and its accelerated copy."""
    torch.manual_seed(0)
    block = SwinBlock(16, 2, window, shift).double()
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.bias)
    return block, cpu.accelerate(copy.deepcopy(block))


@pytest.mark.parametrize("chunk", [1, 500, 10**6])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(4, 8), (5, 11), (1, 1), (9, 4)])
def test_window_attention(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], shift: int, chunk: int
) -> None:
    """Values and every gradient, for pieces of any size."""
    monkeypatch.setattr(windows, "CHUNK", chunk)
    plain, fast = double_blocks(4, shift)
    x = torch.randn(3, *size, 16, dtype=torch.float64, requires_grad=True)

    def run(block: SwinBlock) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = block.attend(x)
        wanted = (x, *block.attn.parameters())
        return y, torch.autograd.grad((y * y.detach().cos()).sum(), wanted)

    (own, gradients), (expected, exact) = run(fast), run(plain)
    with torch.no_grad():
        assert torch.equal(fast.attend(x), own)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("frozen", [True, False])
def test_window_attention_under_autocast(frozen: bool) -> None:
    plain, fast, _ = fast_block()
    fast.requires_grad_(not frozen)
    x = torch.randn(2, 7, 9, 16, requires_grad=True)
    expected = plain(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(x)
    (own,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(own, gradient, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("amp", [False, True])
def test_decoder_with_folded_norms(amp: bool) -> None:
    torch.manual_seed(0)
    plain = mask_predictor.MaskPredictor((8, 16, 32, 64)).eval()
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.get_buffer("running_mean").normal_()
            part.get_buffer("running_var").uniform_(0.5, 2)
    fast = cpu.accelerate(copy.deepcopy(plain))
    close = {"rtol": 5e-2, "atol": 5e-2} if amp else {"rtol": 1e-4, "atol": 1e-5}

    def decode(batch: int, side: int) -> tuple[Tensor, Tensor]:
        maps = [torch.randn(batch, 8 * 2**i, side // 2**i, 12 // 2**i) for i in range(4)]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return fast(maps).float(), plain(maps).float()

    for batch, side in ((2, 16), (1, 40), (2, 16)):  # weights are packed for the first size
        torch.testing.assert_close(*decode(batch, side), **close)
    for decoder in (plain, fast):
        with torch.no_grad():
            decoder.get_submodule("bn1_4").get_buffer("running_mean").add_(100)
    torch.testing.assert_close(*decode(2, 16), **close)
