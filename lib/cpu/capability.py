"""What this CPU and this build of PyTorch can do."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


@cache
def pays() -> bool:
    """Whether :func:`lib.cpu.accelerate` makes a model faster here: on AVX-512, with oneDNN.

    With AVX2 it gains about 1 %.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn_has(torch.float32)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 matmuls."""
    # Private to torch: where they are missing, they count as absent.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether PyTorch's oneDNN computes in a dtype on this CPU, with packed weights."""
    needed = ("_linear_pointwise", "_convolution_pointwise")
    if not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


@cache
def onednn_beats_mkl() -> bool:
    """Whether oneDNN is faster than MKL, PyTorch's own choice, in float32 matmuls.

    MKL uses its AVX-512 code on Intel's processors only; on others oneDNN is twice as fast.
    """
    cpu = Path("/proc/cpuinfo")
    return (
        pays()
        and torch.backends.mkl.is_available()
        and cpu.is_file()
        and "GenuineIntel" not in cpu.read_text(errors="replace")
    )
