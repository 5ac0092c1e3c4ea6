"""State files of a run: whole or not at all, and the newest good one is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoint import read_checkpoint
from lib.errors import InputError
from lib.training.state_files import StateFiles
from tests.scripts import REPO, environment


def content(number: int, size: int = 1000) -> dict[str, Any]:
    """A state that can be told from others."""
    weights = {"w": torch.full((size,), float(number))}
    return {"model": weights, "optimizer": {}, "lr_scheduler": {}, "epoch": number}


def epoch_of(path: Path) -> int:
    return read_checkpoint(path)["epoch"]


def damage(path: Path) -> None:
    """Flip a bit of the weights, as a failing disk would; in a copy, not in a second name."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.full((4,), float(epoch_of(path))).numpy().tobytes()) + 8] ^= 16
    path.unlink()
    path.write_bytes(raw)


def test_last_previous_and_best(tmp_path: Path) -> None:
    files = StateFiles(tmp_path / "new" / "folder", "m")
    assert files.newest() == (None, [])
    for number, best in enumerate((True, False, True, False)):
        files.save(content(number), best=best)
    assert [epoch_of(p) for p in (files.last, files.previous, files.best)] == [3, 2, 2]
    assert files.newest() == (files.last, [])
    names = sorted(p.name for p in files.last.parent.iterdir())
    assert names == ["model_best_m.pth", "model_last_m.pth", "model_previous_m.pth"]


def test_saving_does_not_change_the_best_behind_its_name(tmp_path: Path) -> None:
    """Names of one file part when one of them gets another file."""
    files = StateFiles(tmp_path, "m")
    files.save(content(1), best=True)
    assert files.best.samefile(files.last)
    files.save(content(2))
    assert (epoch_of(files.best), epoch_of(files.last)) == (1, 2)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    files = StateFiles(tmp_path, "m")
    for number in range(3):
        files.save(content(number), best=number == 1)
    assert [epoch_of(p) for p in (files.last, files.previous, files.best)] == [2, 1, 1]


def test_a_damaged_state_is_passed_over(tmp_path: Path) -> None:
    files = StateFiles(tmp_path, "m")
    for number in (1, 2, 3):
        files.save(content(number), best=number == 1)
    damage(files.last)
    newest, complaints = files.newest()
    assert newest == files.previous
    assert len(complaints) == 1
    assert "model_last_m.pth is damaged" in complaints[0]
    assert "checksum" in complaints[0]
    files.previous.write_bytes(b"")
    assert files.newest()[0] == files.best
    torch.save({"model": content(1)["model"]}, files.best)
    newest, complaints = files.newest()
    assert newest is None
    assert "weights only" in complaints[2]


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path: Path) -> None:
    files = StateFiles(tmp_path, "m")
    files.save(content(5, size=64))
    raw = files.last.read_bytes()
    first = raw.index(torch.full((4,), 5.0).numpy().tobytes())
    for position in range(first, first + 64 * 4, 37):
        broken = bytearray(raw)
        broken[position] ^= 1
        files.last.write_bytes(broken)
        with pytest.raises(InputError, match="damaged"):
            read_checkpoint(files.last)


@pytest.mark.parametrize("moment", range(6))
def test_killed_at_any_moment_of_saving(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes a name is a moment to die before; each file stays whole."""

    class Killed(BaseException):
        pass

    files = StateFiles(tmp_path, "m")
    for number in (1, 2):
        files.save(content(number), best=True)
    calls = 0

    def counted(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("link", "replace"):
            patch.setattr(os, name, counted(name))
        try:
            files.save(content(3), best=True)
        except Killed:
            assert moment < 5
    assert epoch_of(files.last) in (2, 3)
    assert epoch_of(files.best) in (2, 3)
    assert epoch_of(files.previous) in (1, 2)
    assert epoch_of(files.best) >= epoch_of(files.last)
    assert files.newest()[0] == files.last
    files.save(content(4), best=True)  # what was left lying about is no hindrance
    assert [epoch_of(p) for p in (files.last, files.best)] == [4, 4]
    assert not list(tmp_path.glob("*.partial"))


FILL = """
import resource, sys, torch
from lib.errors import InputError
from lib.training.state_files import StateFiles
files = StateFiles(sys.argv[1], "m")
state = {"model": {"w": torch.ones(200_000)}, "optimizer": {}, "lr_scheduler": {}, "epoch": 2}
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    files.save(state)
except InputError as e:
    sys.exit(f"error: {e}")
"""


def save_elsewhere(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FILL, str(folder), how],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPO,
        timeout=300,
    )


def check_refused(done: subprocess.CompletedProcess[str], files: StateFiles) -> None:
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {files.last}")
    assert "free some space" in done.stderr
    assert done.stderr.count("\n") == 1
    assert epoch_of(files.last) == 1
    assert not list(files.last.parent.glob("*.partial"))


def test_no_room_for_the_file(tmp_path: Path) -> None:
    """A limit on file sizes fails as a full disk does."""
    files = StateFiles(tmp_path, "m")
    files.save(content(1))
    check_refused(save_elsewhere(tmp_path, "limit"), files)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        files = StateFiles(tmp_path, "m")
        files.save(content(1))
        check_refused(save_elsewhere(tmp_path, "as it is"), files)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_file_system_that_became_read_only(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        files = StateFiles(tmp_path, "m")
        files.save(content(1))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        check_refused(save_elsewhere(tmp_path, "as it is"), files)
        assert files.newest() == (files.last, [])
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_setting_an_earlier_run_aside(tmp_path: Path) -> None:
    files = StateFiles(tmp_path, "m")
    files.save(content(1), best=True)
    files.save(content(2))
    files.rename_existing()
    assert files.newest() == (None, [])
    files.save(content(3), best=True)
    moved = files.rename_existing(keep=tmp_path / "." / "model_best_m.pth")
    # Last and best are one file here: that what is continued from stays, by either name.
    assert moved == []
    files.save(content(4))
    moved = files.rename_existing(keep=files.best)
    assert [p.name for p in moved] == ["model_last_m.2.pth"]
    assert epoch_of(tmp_path / "model_last_m.1.pth") == 2
    assert epoch_of(tmp_path / "model_best_m.1.pth") == 1
    assert files.newest() == (files.previous, [])
