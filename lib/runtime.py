"""How a model runs: mixed precision, memory format, compilation, TF32, recomputation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lib.errors import InputError
from lib.swin import SwinBlock

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP = (*AMP_DTYPES, "auto")


def resolve_amp(amp: str, device: torch.device) -> str:
    """'auto' becomes 'bf16' where the hardware multiplies in bfloat16, else 'off'."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    # Private to torch, so their absence must do no harm: then it is merely slower.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bf16" if native else "off"


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision of a forward pass: one of :data:`AMP`; 'off' is float32."""
    dtype = AMP_DTYPES[resolve_amp(amp, device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def prepare(model: nn.Module, *, channels_last: bool, compiled: bool, tf32: bool) -> None:
    """Make a model that is where it will run ready to be evaluated.

    Args:
        model: on its device.
        channels_last, compiled, tf32: whether to use :func:`use_channels_last`,
            :func:`compile_module`, :func:`allow_tf32`.

    Raises:
        InputError: it cannot be compiled here.
    """
    if channels_last:
        use_channels_last(model)
    if compiled:
        compile_module(model)
    if tf32:
        allow_tf32()


def use_channels_last(model: nn.Module) -> None:
    """Keep the weights of convolutions channel by channel, as a GPU's tensor cores want them."""
    model.to(memory_format=torch.channels_last)


def recompute_blocks(model: nn.Module) -> None:
    """Have Swin blocks keep their input alone for the backward pass, and compute the rest again.

    The same gradients, dropout included, for about a third more computing.
    """
    for module in model.modules():
        if isinstance(module, SwinBlock):
            module.recompute = True


def compile_module(module: nn.Module) -> None:
    """Let ``torch.compile`` make one program of a module's forward pass, at its first call.

    Weights keep their names.

    Raises:
        InputError: on the CPU, if there is no C++ compiler.
    """
    if all(p.device.type == "cpu" for p in module.parameters()):
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        except ImportError:  # another torch keeps it elsewhere; it will speak for itself
            pass
        except RuntimeError as e:
            raise InputError("--compile needs a C++ compiler on the CPU: install g++") from e
    module.compile()


def allow_tf32() -> None:
    """Let a GPU multiply float32 with 10 bits of mantissa, several times faster."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
