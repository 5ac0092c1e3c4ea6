"""Matmuls, convolutions and prepared weights for eager CPU code.

A kernel computes what its plain PyTorch form does, to rounding, or returns None where it does not
apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from lib.cpu.capability import onednn_beats_mkl, onednn_has

T = TypeVar("T")

# Multiply-adds from which a float32 matmul in training is faster by oneDNN.
LARGE = 2**23
# Rows from which packing a weight for a single matmul pays.
MANY = 2048
# Rows of a feature map for which the gradient of a convolution's weight is computed at a time.
STRIP = 30


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain CPU tensors, and operators run eagerly and unobserved."""
    return (
        x.is_cpu
        and weight.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matmul of ``x`` runs in, autocast considered."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---- prepared weights ----

_prepared = WeakTensorKeyDictionary()  # weight -> {name: (stamps, value)}


def prepared(name: object, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
    """``make()``, computed from weights and kept until one of them changes.

    A weight changes when it is written to, in place or by ``load_state_dict``, or gets other
    memory, as by ``.to(device)``. Fused optimizers and writes through ``.data`` do not raise a
    tensor's version; they are noticed if they change one of some elements spread over the
    weight, and in any case after the module's next ``train()`` or ``eval()``, which call
    :func:`forget`. Nothing is kept on modules: copies, pickles and state dicts do not have it, and
    it is freed with the weight.

    Args:
        name: of the result; one for each ``make``.
        sources: all tensors that it is computed from.
        make: called without recording gradients.
    """
    if any(s.is_inference() for s in sources):  # without a version
        return make()
    known = _prepared.setdefault(sources[0], {})
    if name in known:
        stamps, value = known[name]
        if all(was.fits(s) for s, was in zip(sources, stamps, strict=True)):
            return value
    with torch.no_grad():
        value = make()
    known[name] = (tuple(map(_Stamp.of, sources)), value)
    return value


def forget(weights: Iterable[Tensor]) -> None:
    """Drop what :func:`prepared` keeps of these first sources."""
    for weight in weights:
        _prepared.pop(weight, None)


class _Stamp(NamedTuple):
    """Identifies a tensor and its content."""

    storage: StorageWeakRef  # keeps the address from being used again, but not the memory
    version: int
    view: tuple[object, ...]
    sample: Tensor  # some elements

    @classmethod
    def of(cls, tensor: Tensor) -> _Stamp:
        """Of a tensor as it is now."""
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor._version, _view(tensor), _sample(tensor).clone())

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor is the same and unchanged."""
        return (
            tensor._version == self.version
            and tensor.untyped_storage()._cdata == self.storage.cdata
            and _view(tensor) == self.view
            and torch.equal(_sample(tensor), self.sample)
        )


def _view(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 16)]


# ---- matmuls ----


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False
) -> Tensor | None:
    """``F.linear``; with ``gelu`` an exact (erf) GELU follows, in inference only.

    Args:
        x: (..., in).
        weight: (out, in), or (out, in, 1) as of a 1x1 convolution.
        bias: (out,), or None.
        gelu: whether to apply GELU.

    Returns:
        (..., out), in bfloat16 under such autocast; None where the kernel does not apply.
    """
    if not (applies(x, weight) and x.numel() and x.is_contiguous()):
        return None
    dtype = matmul_dtype(x)
    exact = dtype == weight.dtype == torch.float32 and onednn_beats_mkl()
    if not wants_grad(x, weight, bias):
        if exact or (dtype == torch.bfloat16 and onednn_has(dtype)):
            return _onednn(x.to(dtype), *_packed(weight, bias, dtype), gelu)
    elif exact and not gelu and x.numel() * len(weight) >= LARGE:
        return _OneDnnLinear.apply(x, weight.flatten(1), bias)
    return None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    operation, form = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, operation, [], form)


def _packed(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in a dtype, the weight in oneDNN's own memory layout."""

    def pack() -> Tensor:
        plain = weight.detach().flatten(1).to(dtype).contiguous()
        return torch.ops.mkldnn._reorder_linear_weight(plain, None)

    packed = prepared(("packed", dtype), (weight,), pack)
    if bias is None or bias.dtype == dtype:
        return packed, bias
    return packed, prepared(dtype, (bias,), lambda: bias.detach().to(dtype))


def conv_relu(
    x: Tensor,
    sources: tuple[Tensor, ...],
    make: Callable[[torch.dtype], tuple[Tensor, Tensor]],
) -> Tensor | None:
    """ReLU of a 3x3 convolution with padding 1, whose weights are computed from others.

    In inference only, and only where :func:`applies` is true.

    Args:
        x: (B, in, H, W).
        sources: as of :func:`prepared`.
        make: weight (out, in, 3, 3) and bias (out,) in a dtype.

    Returns:
        (B, out, H, W), in bfloat16 under such autocast; None where the kernel does not apply.
    """
    dtype = matmul_dtype(x)
    if not onednn_has(dtype):
        return None
    once = [1, 1]

    def pack() -> tuple[Tensor, Tensor]:
        weight, bias = make(dtype)
        order = torch.ops.mkldnn._reorder_convolution_weight
        return order(weight, once, once, once, 1, list(x.shape)), bias

    # Packed for the size of the first input; it works for others, too.
    weight, bias = prepared(("conv", dtype), sources, pack)
    return torch.ops.mkldnn._convolution_pointwise(
        x.to(dtype), weight, bias, once, once, once, 1, "relu", [], ""
    )


def conv3x3(x: Tensor, weight: Tensor) -> Tensor | None:
    """3x3 convolution with padding 1 for training in float32 on large feature maps.

    (B, in, H, W) and (out, in, 3, 3) -> (B, out, H, W); None where the kernel does not apply.
    """
    large = x.shape[-2] >= 2 * STRIP
    if large and applies(x, weight) and wants_grad(weight) and matmul_dtype(x) == torch.float32:
        return _Conv3x3.apply(x, weight)
    return None


class _Conv3x3(torch.autograd.Function):
    """:func:`conv3x3`; computes the gradient of the weight by strips of rows.

    oneDNN's float32 gradient of a weight is a third slower on maps larger than the caches.
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
        grad_x = _conv_gradients(grad, x, weight, [1, 1], for_weight=False) if for_x else None
        if not for_weight:
            return grad_x, None
        total = torch.zeros_like(weight)
        for image, grad_image in zip(F.pad(x, (0, 0, 1, 1)).split(1), grad.split(1), strict=True):
            for top, part in zip(
                range(0, x.shape[-2], STRIP), grad_image.split(STRIP, dim=-2), strict=True
            ):
                rows = image[:, :, top : top + part.shape[-2] + 2]
                total += _conv_gradients(part, rows, weight, [0, 1], for_weight=True)
        return grad_x, total


def _conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: list[int], *, for_weight: bool
) -> Tensor:
    """The gradient of a convolution's weight, or of its input."""
    once, mask = [1, 1], [not for_weight, for_weight, False]
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, once, padding, once, False, [0, 0], 1, mask
    )
    return gradients[1 if for_weight else 0]


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
    if grad.shape[1] > inside and rows >= inside:  # the transposed product is faster
        return _onednn(x.t().contiguous(), grad.t(), None).t().contiguous()
    return _onednn(grad.t(), x.t(), None)
