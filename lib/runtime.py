"""How a model runs: mixed precision, memory format, compilation, TF32, recomputation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lib.errors import InputError
from lib.swin import SwinBlock

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP = (*AMP_DTYPES, "auto")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device of this machine; None is the first GPU there is, else the CPU.

    Raises:
        InputError: there is no such device, or it does not work.
    """
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        chosen = torch.device(device)
        (torch.ones(1, device=chosen) + 1).cpu()
    except Exception as e:  # each kind of device has errors of its own
        raise InputError(f"device '{device}' does not work here: give cpu, cuda or mps") from e
    return chosen


def resolve_amp(amp: str, device: torch.device) -> str:
    """'auto' becomes 'bf16' where the hardware supports bfloat16 matmuls, else 'off'."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    if device.type != "cpu":
        return "off"
    from lib.cpu import multiplies_bfloat16  # optional: only this question needs it

    return "bf16" if multiplies_bfloat16() else "off"


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision of a forward pass: one of :data:`AMP`; 'off' is float32."""
    dtype = AMP_DTYPES[resolve_amp(amp, device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def prepare(model: nn.Module, *, channels_last: bool, compiled: bool, tf32: bool) -> None:
    """Apply :func:`use_channels_last`, :func:`compile_module`, :func:`allow_tf32` where asked.

    Args:
        model: on its device.
        channels_last, compiled, tf32: which of them.

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
    """Store the weights of convolutions in channels-last order, the faster one on a GPU."""
    model.to(memory_format=torch.channels_last)


def recompute_blocks(model: nn.Module) -> None:
    """Use gradient checkpointing in Swin blocks: less memory, about a third more computation.

    Gradients are the same, with dropout too.
    """
    for module in model.modules():
        if isinstance(module, SwinBlock):
            module.recompute = True


def compile_module(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a module with ``torch.compile``, at its first call; weights keep their names.

    A batch of other shapes compiles it again: training has none, evaluation fills its batches.

    Args:
        module: on its device.
        backend: of ``torch.compile``.

    Raises:
        InputError: on the CPU, if there is no C++ compiler.
    """
    if backend == "inductor" and all(p.device.type == "cpu" for p in module.parameters()):
        compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
        if not any(map(shutil.which, compilers)):
            raise InputError("--compile needs a C++ compiler on the CPU: install g++")
    module.compile(backend=backend)


def allow_tf32() -> None:
    """Use TF32 for float32 matmuls on a GPU: 10 bits of mantissa, several times faster."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
