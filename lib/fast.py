"""What ``--fast`` stands for: the flags that are fastest on a device."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch

from lib.runtime import resolve_amp

# Scripts that run long enough to win back the minute or two that compiling takes.
COMPILED = ("train.py", "test.py")
TF32_SINCE, TRITON_SINCE = (8, 0), (7, 0)  # compute capabilities


def fast_flags(device: str, script: str, local_rank: int = 0) -> list[str]:
    """The flags that ``--fast`` stands for.

    On a CPU it is bfloat16 where that has instructions. Channels-last order gained 5 % of a forward
    pass and nothing of a training step (AVX2); ``torch.compile`` takes minutes there, and goes
    without the kernels of :mod:`lib.cpu`.

    Args:
        device: of ``--device``; the CPU is used where there is no CUDA.
        script: whose command line it is, like ``train.py``.
        local_rank: of this process, which uses the GPU of that number.

    Returns:
        Words of a command line; AdamW is fused without a flag.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        here = torch.device("cpu" if device.startswith(("cuda", "cpu")) else "mps")
        return _amp(here)
    gpu = torch.device("cuda", min(local_rank, torch.cuda.device_count() - 1))
    capability = torch.cuda.get_device_capability(gpu)
    flags = [*_amp(gpu), "--channels_last", "--pin_mem"]
    if capability >= TF32_SINCE:
        flags.append("--tf32")
    if script in COMPILED and capability >= TRITON_SINCE and can_compile():
        flags.append("--compile")
    return flags


def can_compile() -> bool:
    """Whether ``torch.compile`` finds what it needs for a GPU: Triton and a C compiler."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return find_spec("triton") is not None and any(map(shutil.which, compilers))


def _amp(device: torch.device) -> list[str]:
    """bf16 where the hardware has it; PyTorch would emulate it elsewhere, which is slow."""
    amp = resolve_amp("auto", device)
    return [] if amp == "off" else ["--amp", amp]


def describe(flags: Sequence[str], in_effect: Mapping[str, object]) -> str:
    """The flags of :func:`fast_flags`, without those that others on the command line replaced.

    Args:
        flags: of a command line.
        in_effect: the values that hold, by the flags' names.
    """
    kept: list[str] = []
    for flag, value in zip(flags, [*flags, "--"][1:], strict=True):
        wanted = True if value.startswith("--") else value
        if flag.startswith("--") and in_effect.get(flag[2:]) == wanted:
            kept += [flag] if wanted is True else [flag, value]
    return " ".join(kept) or "no other flag here"
