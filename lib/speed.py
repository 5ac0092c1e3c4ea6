"""Ways to compute the same faster or in less memory, each asked for by an option."""

from __future__ import annotations

import torch
from torch import nn

from lib.errors import InputError
from lib.swin import SwinBlock


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
