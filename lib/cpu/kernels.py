"""The same numbers, sooner: matmuls and prepared weights for eager CPU code.

Each function computes what its plain PyTorch form does, to rounding. The plain form runs where
this one does not apply: on a GPU, in a compiled or exported graph, and under whatever watches
PyTorch's operators (FLOP counters, fake tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
MakeConv = Callable[[torch.dtype], tuple[Tensor, Tensor]]

# Multiply-adds from which a float32 matmul is worth another library than PyTorch's own choice.
LARGE = 2**23
# Rows from which a weight is worth being put in oneDNN's order for a single matmul.
MANY = 2048
# Rows of a map for which the gradient of a convolution's weight is computed at a time.
STRIP = 30


_plain = False


@contextmanager
def plain() -> Iterator[None]:
    """Within it everything runs in its plain PyTorch form, to compare with."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def eager() -> bool:
    """Whether operators run here and now, and nothing records or watches them."""
    return not (
        _plain
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
    )


def eager_cpu(*tensors: Tensor) -> bool:
    """Whether these are on the CPU and :func:`eager`."""
    return eager() and all(t.device.type == "cpu" for t in tensors)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type that a matmul of ``x`` runs in, autocast considered."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---- what is made of weights, and remembered while they stay as they are ----

_derived = WeakTensorKeyDictionary()  # weight -> {name: (stamps, value)}


def derived(name: object, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
    """What ``make`` makes of weights, made again only when one of them has changed.

    A weight has changed when it was written to, in place or by ``load_state_dict``, or has other
    memory, as after ``.to(device)``; an optimizer's step counts as a change of all. Writes through
    ``.data`` or numpy are seen on the CPU if they change one of some elements spread over the
    weight, as averaging weights does; others go unseen until :func:`forget`, which a model's
    ``train()`` and ``eval()`` call. Nothing is kept on the modules: copies, pickles and
    state dicts know of nothing, and it goes when the weight goes.

    Args:
        name: what is made, the same for the same ``sources`` and ``make``.
        sources: all weights that it is made of.
        make: makes it; called without recording gradients.
    """
    if not eager() or any(s.is_inference() for s in sources):
        return make()
    known = _derived.setdefault(sources[0], {})
    if name in known:
        stamps, value = known[name]
        if all(was.fits(s) for s, was in zip(sources, stamps, strict=True)):
            return value
    with torch.no_grad():
        value = make()
    known[name] = (tuple(map(_Stamp.of, sources)), value)
    return value


def forget(*_: object) -> None:
    """Drop everything that :func:`derived` remembers."""
    _derived.clear()


# Fused optimizers write without autograd knowing.
register_optimizer_step_post_hook(forget)


class _Stamp(NamedTuple):
    """What tells that a tensor is still the same, unchanged."""

    storage: StorageWeakRef  # keeps the storage's address from being used again, not its memory
    version: int
    view: tuple[object, ...]
    sample: Tensor | None  # some elements; on a GPU, which would have to be waited for, none

    @classmethod
    def of(cls, tensor: Tensor) -> _Stamp:
        """The stamp of a tensor as it is now."""
        storage = StorageWeakRef(tensor.untyped_storage())
        sample = _sample(tensor).clone() if tensor.device.type == "cpu" else None
        return cls(storage, tensor._version, _view(tensor), sample)

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor is the one that was stamped, as it was."""
        return (
            tensor._version == self.version
            and tensor.untyped_storage()._cdata == self.storage.cdata
            and _view(tensor) == self.view
            and (self.sample is None or torch.equal(_sample(tensor), self.sample))
        )


def _view(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 16)]


# ---- matmuls ----


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """(..., in) -> (..., out), with an exact GELU after it where asked."""
        return linear(x, self.weight, self.bias, gelu)


def use_linear(module: nn.Module) -> None:
    """Let the plain ``nn.Linear`` within a module of another library be :class:`Linear`."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """``F.linear``, and an exact (erf) GELU after it where asked.

    Args:
        x: (..., in).
        weight: (out, in), or (out, in, 1) as of a 1x1 convolution.
        bias: (out,), or None.
        gelu: whether to apply GELU.

    Returns:
        (..., out), in bfloat16 under such autocast.
    """
    if eager_cpu(x, weight) and x.numel() and x.is_contiguous():
        dtype = matmul_dtype(x)
        recorded = wants_grad(x, weight, bias)
        exact = dtype == weight.dtype == torch.float32 and _onednn_beats_mkl()
        if not recorded and (exact or (dtype == torch.bfloat16 and _onednn_has(dtype))):
            return _onednn(x.to(dtype), *_packed(weight, bias, dtype), gelu)
        if exact and x.numel() * len(weight) >= LARGE:
            y = _OneDnnLinear.apply(x, weight.flatten(1), bias)
            return F.gelu(y) if gelu else y
    y = F.linear(x, weight.flatten(1), bias)
    return F.gelu(y) if gelu else y


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    operation, form = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, operation, [], form)


def _packed(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in a type, the weight in the order that oneDNN likes best."""

    def pack() -> Tensor:
        plain = weight.detach().flatten(1).to(dtype).contiguous()
        return torch.ops.mkldnn._reorder_linear_weight(plain, None)

    packed = derived(("packed", dtype), (weight,), pack)
    if bias is None or bias.dtype == dtype:
        return packed, bias
    return packed, derived(dtype, (bias,), lambda: bias.detach().to(dtype))


def conv_relu(x: Tensor, name: object, sources: tuple[Tensor, ...], make: MakeConv) -> Tensor:
    """ReLU of a 3x3 convolution whose weights are made of others; while evaluating only.

    Args:
        x: (B, in, H, W).
        name, sources: as of :func:`derived`.
        make: makes (weight (out, in, 3, 3), bias (out,)) in the type that is given to it.

    Returns:
        (B, out, H, W), in bfloat16 under such autocast.
    """
    dtype = matmul_dtype(x)
    if not (eager_cpu(x) and dtype in (torch.float32, torch.bfloat16) and _onednn_has(dtype)):
        weight, bias = derived((name, dtype), sources, lambda: make(dtype))
        return F.relu_(F.conv2d(x.to(dtype), weight, bias, padding=1))
    once = [1, 1]

    def pack() -> tuple[Tensor, Tensor]:
        weight, bias = make(dtype)
        order = torch.ops.mkldnn._reorder_convolution_weight
        return order(weight, once, once, once, 1, list(x.shape)), bias

    # Packed for the first size that comes, it serves the others.
    weight, bias = derived((name, dtype, "packed"), sources, pack)
    return torch.ops.mkldnn._convolution_pointwise(
        x.to(dtype), weight, bias, once, once, once, 1, "relu", [], ""
    )


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 convolution with padding 1: (B, in, H, W) by (out, in, 3, 3) -> (B, out, H, W)."""
    large = x.shape[-2] >= 2 * STRIP
    if large and eager_cpu(x) and wants_grad(weight) and matmul_dtype(x) == torch.float32:
        return _Conv3x3.apply(x, weight)
    return F.conv2d(x, weight, padding=1)


class _Conv3x3(torch.autograd.Function):
    """:func:`conv3x3`, with the gradient of the weight a strip of rows at a time.

    oneDNN's float32 gradient of a weight is a third slower on maps that the caches do not hold.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        found_x = _conv_gradients(grad, x, weight, [1, 1], for_weight=False) if for_x else None
        if not for_weight:
            return found_x, None
        total = torch.zeros_like(weight)
        for image, its_grad in zip(F.pad(x, (0, 0, 1, 1)).split(1), grad.split(1), strict=True):
            for top, part in zip(
                range(0, x.shape[-2], STRIP), its_grad.split(STRIP, dim=-2), strict=True
            ):
                rows = image[:, :, top : top + part.shape[-2] + 2]
                total += _conv_gradients(part, rows, weight, [0, 1], for_weight=True)
        return found_x, total


def _conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: list[int], *, for_weight: bool
) -> Tensor:
    """The gradient of a convolution's weight, or of its input."""
    once, mask = [1, 1], [not for_weight, for_weight, False]
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, once, padding, once, False, [0, 0], 1, mask
    )
    return found[1 if for_weight else 0]


class _OneDnnLinear(torch.autograd.Function):
    """``F.linear`` in float32, forward and backward, by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.numel() >= MANY * x.shape[-1]:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _onednn(grad.contiguous(), weight.t(), None) if for_x else None,
            _weight_gradient(rows, x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(R, out) and (R, in) -> (out, in), their sum of outer products over the rows."""
    rows, inside = x.shape
    if grad.shape[1] > inside and rows >= inside:  # the transposed result comes sooner
        return _onednn(x.t().contiguous(), grad.t(), None).t().contiguous()
    return _onednn(grad.t(), x.t(), None)


@lru_cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether PyTorch's oneDNN multiplies in a type on this CPU, with packed weights."""
    needed = ("_linear_pointwise", "_convolution_pointwise")
    if not (torch.backends.mkldnn.is_available() and all(map(_has_operator, needed))):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _has_operator(name: str) -> bool:
    return hasattr(torch.ops.mkldnn, name)


@lru_cache
def _onednn_beats_mkl() -> bool:
    """Whether float32 matmuls are better done by oneDNN than by MKL, PyTorch's own choice.

    MKL keeps its AVX-512 code to Intel's processors; on others oneDNN's is twice as fast.
    """
    cpu = Path("/proc/cpuinfo")
    return (
        _onednn_has(torch.float32)
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu.is_file()
        and "GenuineIntel" not in cpu.read_text(errors="replace")
    )
