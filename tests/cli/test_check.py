"""The data doctor as a command: its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import TIMEOUT, Shapes, environment


def doctor(cwd: Path, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refer.check", "--refer_data_root", str(root), *options],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def test_generated_data_is_sound(shapes: Shapes, tmp_path: Path) -> None:
    options = ["--dataset", "refcocog", "--splitBy", "umd", "--images", "--json", "r.json"]
    tokenizer = ["--bert_tokenizer", str(shapes.root / "bert")]
    done = doctor(tmp_path, shapes.root, *options, *tokenizer)
    assert (done.returncode, done.stderr) == (0, "")
    assert "refcocog(umd) is sound" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["sound"] is True


@pytest.mark.parametrize(
    ("name", "code"),
    [("images/mscoco/images/train2014/*.jpg", 1), ("refcoco/instances.json", 2)],
    ids=["damaged", "unreadable"],
)
def test_exit_codes(shapes: Shapes, tmp_path: Path, name: str, code: int) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes.root, root)
    path = next(root.glob(name))
    path.write_bytes(path.read_bytes()[:200])
    done = doctor(tmp_path, root, "--images")
    assert done.returncode == code, done.stderr
    where = done.stdout if code == 1 else done.stderr
    assert path.name in where
    assert "Traceback" not in done.stderr
