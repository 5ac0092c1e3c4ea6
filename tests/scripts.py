"""Running the project's scripts from tests, as a user would or in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError

REPO = Path(__file__).parent.parent
TINY = ["--swin_type", "micro", "--img_size", "56", "--ape", "14", "--workers", "0"]
TIMEOUT = 300


@dataclass(frozen=True)
class Shapes:
    """Options that point the scripts at a generated REFER root."""

    root: Path

    @property
    def options(self) -> list[str]:
        """Data, text and a small model."""
        bert = str(self.root / "bert")
        data = ["--refer_data_root", str(self.root), "--ck_bert", bert, "--bert_tokenizer", bert]
        return [*data, *TINY, "--device", "cpu"]

    @property
    def train_options(self) -> list[str]:
        """A run of a few steps from fresh weights."""
        recipe = ["--text_from_scratch", "--lang_layers", "all", "--loss", "dice", "--lr", "1e-3"]
        return [*self.options, *recipe, "--batch-size", "4", "--print-freq", "1"]


def run(
    cwd: Path, script: str, *args: str, launcher: Sequence[str] = (), threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """A script of the project in its own process, from the folder ``cwd``."""
    return subprocess.run(
        [sys.executable, *launcher, str(REPO / script), *args],
        cwd=cwd,
        env=environment(threads),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def environment(threads: int = 1) -> dict[str, str]:
    """The environment of a child process: few threads, no network, our modules."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPO),
    }


def torchrun(processes: int) -> list[str]:
    """Launcher words for so many processes on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_line_error(main: Callable[[Sequence[str] | None], None], argv: Sequence[str]) -> str:
    """The single line that a script would end with."""
    with pytest.raises(InputError) as caught:
        main(argv)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
