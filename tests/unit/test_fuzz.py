"""The fuzzer: a second per kind of file, and a reader that fails is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_findings(name: str) -> None:
    outcomes, findings = fuzz.fuzz(name, 1.0, seed=1)
    assert not findings
    assert outcomes["read"] + outcomes["InputError"] == outcomes.total() > 3
    assert outcomes["InputError"]


def test_another_exception_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(path: Path) -> None:
        raise KeyError(path.name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fuzz.TARGETS, "refs", ("x", lambda: b"sound", read))
    with pytest.raises(SystemExit):
        fuzz.main(["--seconds", "0.1", "--target", "refs"])
    assert "KeyError: 'x'" in capsys.readouterr().out
    assert list(Path("fuzz_findings").iterdir())
