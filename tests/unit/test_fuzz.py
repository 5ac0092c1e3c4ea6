"""The fuzzer: a few hundred cases, and proof that it finds what it looks for."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from lib.errors import InputError
from tests.stress import fuzz
from tests.stress.fuzz_cases import MARKER, TARGETS, Sound, Target

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer needs Linux")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_no_findings(sound: Sound, tmp_path: Path, name: str) -> None:
    tally = fuzz.run_batch(lambda: TARGETS[name](sound), name, 60, 1, tmp_path / "work")
    assert tally.findings == {}
    assert tally.cases >= 50
    assert tally.refused > 0
    assert tally.accepted > 0
    assert tally.accepted + tally.refused == tally.cases


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_seed_draws_the_same(sound: Sound, tmp_path: Path, name: str) -> None:
    drawn: list[list[bytes]] = []
    for seed in (5, 5, 6):
        cases: list[bytes] = []
        target = Target(TARGETS[name](sound).cases, lambda case, folder, to=cases: to.append(case))
        (tmp_path / str(len(drawn))).mkdir()
        fuzz.run_cases(target, name, 5, seed, tmp_path / str(len(drawn)))
        drawn.append(cases)
    if name != "checkpoints":  # torch writes a different number into each
        assert drawn[0] == drawn[1]
    assert drawn[1] != drawn[2]


def _runs_pickles(case: bytes, folder: Path) -> None:
    pickle.loads(case)


def _marks(case: bytes, folder: Path) -> None:
    (folder / MARKER).touch()


def _writes_elsewhere(case: bytes, folder: Path) -> None:
    (folder.parent.parent / "elsewhere").write_bytes(case)


def _makes_folders_elsewhere(case: bytes, folder: Path) -> None:
    (folder.parent.parent / "new").mkdir(exist_ok=True)


def _connects(case: bytes, folder: Path) -> None:
    import socket

    socket.socket().close()


def _fails(case: bytes, folder: Path) -> None:
    raise KeyError(len(case) // 1000)


def _exits(case: bytes, folder: Path) -> None:
    sys.exit(0)


def _hoards(case: bytes, folder: Path) -> None:
    assert bytearray(b"x") * (200 << 20)


def _hangs(case: bytes, folder: Path) -> None:
    while True:
        time.sleep(1)


def _dies(case: bytes, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs_in_native_code(case: bytes, folder: Path) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    _hangs(case, folder)


@pytest.mark.parametrize(
    ("read", "finding"),
    [
        (_runs_pickles, "os.system"),
        (_marks, "a payload was run"),
        (_writes_elsewhere, "open of"),
        (_makes_folders_elsewhere, "os.mkdir of"),
        (_connects, "socket."),
        (_fails, "KeyError at test_fuzz.py"),
        (_exits, "SystemExit"),
        (_hoards, "MB of memory"),
        (_hangs, "more than 1 seconds"),
        (_dies, "exit code -9"),
        (_hangs_in_native_code, "over 3 seconds in native code"),
    ],
)
def test_defective_readers_are_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[bytes, Path], None],
    finding: str,
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "GROWTH", 100 << 10)
    monkeypatch.setattr(fuzz, "MAX_FINDINGS", 1)
    case = b"cos\nsystem\n(S'touch pwned'\ntR."
    target = Target(st.just(case), read)
    tally = fuzz.run_batch(lambda: target, "defective", 1, 0, tmp_path / "work", stuck=3)
    assert len(tally.findings) == 1
    assert finding in next(iter(tally.findings))
    kept = Path(next(iter(tally.findings.values())))
    assert kept.read_bytes() == case
    fuzz._rescue(tally, tmp_path / "kept")
    assert (tmp_path / "kept" / "defective-1.bin").read_bytes() == case
    text = fuzz.as_text([tally])
    assert "--target defective --replay" in text


def test_unclear_messages_are_found(tmp_path: Path) -> None:
    class Unclear(InputError):
        def __str__(self) -> str:
            return "two\nlines"

    def read(case: bytes, folder: Path) -> None:
        raise Unclear("x")

    target = Target(st.just(b""), read)
    tally = fuzz.run_batch(lambda: target, "unclear", 1, 0, tmp_path / "work")
    assert "unclear" in next(iter(tally.findings))


def test_a_run_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--cases", "20", "--target", "images", "--jobs", "1", "--json", "x.json"]
    fuzz.main(argv)
    written = json.loads((tmp_path / "x.json").read_text())
    assert [t["target"] for t in written["targets"]] == ["images"]
    assert written["targets"][0]["findings"] == {}
    assert "images" in capsys.readouterr().out
    (tmp_path / "case.bin").write_bytes(b"no picture")
    fuzz.main(["--target", "images", "--replay", "case.bin"])
    assert capsys.readouterr().out.startswith("refused: ")


def test_findings_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TARGETS, "images", lambda sound: Target(st.binary(max_size=9), _fails))
    argv = ["--cases", "8", "--target", "images", "--jobs", "1", "--json", "x.json"]
    with pytest.raises(SystemExit) as caught:
        fuzz.main(argv)
    assert caught.value.code == 1
    assert (tmp_path / "fuzz_findings" / "images-1.bin").is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--target", "x"], "choose from"),
        (["--cases", "1"], "--cases"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_options(argv: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fuzz.parse(argv)
