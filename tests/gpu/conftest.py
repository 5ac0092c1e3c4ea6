"""The device of the GPU tests, or the CPU that rehearses them (``--dry-run``)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def dry(request: pytest.FixtureRequest) -> bool:
    """Whether the tests are rehearsed: the same lines, on the CPU and at micro size."""
    return bool(request.config.getoption("--dry-run"))


@pytest.fixture(scope="session")
def device(dry: bool) -> torch.device:
    """The GPU; the CPU in a rehearsal."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA; --dry-run rehearses it on the CPU")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def processes(device: torch.device) -> int:
    """As many as there are GPUs."""
    return torch.cuda.device_count() if device.type == "cuda" else 2


@pytest.fixture(autouse=True)
def float32_without_tf32() -> Iterator[None]:
    """PyTorch's own default allows TF32 to convolutions."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture(autouse=True)
def quick_compiling(dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal traces what is compiled, and runs it without C++, which would take minutes."""
    if dry:
        compiled = partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", compiled)
