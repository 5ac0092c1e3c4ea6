"""Scripts whose output nobody reads, or whose terminal shows few characters."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lib.terminal import lost_process, protect
from tests.scripts import REPO

# Prints more than any buffer holds, to a run's end.
SCRIPT = """
import sys
from lib.terminal import protect
protect()
for i in range(3000):
    print("caf\\u00e9 \\u2603", i)
print("na\\u00efve", file=sys.stderr)
open("opened", "w").close()
sys.stdout.flush()
with open("end", "w") as f:
    f.write(str(f.fileno()))
"""


def run(cwd: Path, words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's line in which ``$RUN`` is the script."""
    return subprocess.run(
        ["bash", "-c", words],
        cwd=cwd,
        env=os.environ
        | {"PYTHONPATH": str(REPO), "PYTHON": sys.executable, "SCRIPT": SCRIPT}
        | {"RUN": '"$PYTHON" -c "$SCRIPT"'}
        | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "words",
    [
        "$RUN | head -1; exit ${PIPESTATUS[0]}",
        "$RUN 2>&1 | true; exit ${PIPESTATUS[0]}",
        "$RUN >/dev/full",
        "$RUN >/dev/full 2>&1",
        "$RUN >&-",
        "$RUN 2>&-",
        "$RUN <&- >&- 2>&-",
    ],
)
@pytest.mark.parametrize("flag", ["", "-u"])
def test_output_that_nobody_reads(words: str, flag: str, tmp_path: Path) -> None:
    done = run(tmp_path, words.replace("$RUN", f'"$PYTHON" {flag} -c "$SCRIPT"'))
    assert done.returncode == 0
    assert done.stderr in ("", "naïve\n")
    assert int((tmp_path / "end").read_text()) > 2  # a file never gets stderr's number


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "caf\\xe9 \\u2603 2999"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "caf\\xe9 \\u2603 2999"),
        ({"PYTHONIOENCODING": "utf-8"}, "café ☃ 2999"),
    ],
)
def test_a_terminal_that_shows_few_characters(
    environment: dict[str, str], shown: str, tmp_path: Path
) -> None:
    done = run(tmp_path, '"$PYTHON" -c "$SCRIPT"', **environment)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == shown


def test_a_terminal_that_vanishes(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "end").is_file()


def test_streams_of_tests_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    protect()
    print("é")
    assert sys.stdout is before
    assert capsys.readouterr().out == "é\n"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory.",
            "killed by signal: Bus error)",
        ),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost",
            "exited unexpectedly)",
        ),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "exited unexpectedly)"),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\n"
            "RuntimeError: unable to allocate shared memory(shm) for file </torch_7_1>: "
            "No space left on device (28)\n",
            "unable to allocate shared memory(shm) for file </torch_7_1>: No space left",
        ),
    ],
)
def test_words_for_a_dead_loader_process(message: str, named: str) -> None:
    for several in (False, True):
        line = lost_process(RuntimeError(message), several)
        assert named in line
        for remedy in ("--workers", "--shm-size", "--resume auto"):
            assert remedy in line
        assert "\n" not in line


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_words_for_a_broken_connection_to_a_loader_process(error: Exception) -> None:
    """It may be seen before the death of the process."""

    def numbers() -> Iterator[int]:
        yield 0
        raise error

    with pytest.raises(type(error)) as caught:
        list(DataLoader([1, 2], sampler=numbers()))  # type: ignore[arg-type]
    assert f"process failed ({type(error).__name__})" in lost_process(caught.value, several=False)
    assert not lost_process(error.with_traceback(None), several=False)


def test_words_for_a_file_that_cannot_be_read() -> None:
    """In this process: no other one is to blame."""

    class Data(list[int]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error") as caught:
        list(DataLoader(Data([1, 2])))  # type: ignore[arg-type]
    assert not lost_process(caught.value, several=False)


@pytest.mark.parametrize(
    "error",
    [OSError(24, "Too many open files"), RuntimeError("received 0 items of ancdata")],
)
def test_words_for_too_many_open_files(error: Exception) -> None:
    assert "ulimit -n" in lost_process(error, several=False)


def test_words_for_other_errors() -> None:
    lost = RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:1\nframes")
    assert lost_process(lost, several=True).startswith("another process died")
    assert not lost_process(lost, several=False)
    assert not lost_process(RuntimeError("shapes differ"), several=True)


def test_every_script_is_protected() -> None:
    """By run_script, or by a call of its own where torch is not needed."""
    scripts = []
    for folder in (".", "benchmarks", "data", "refer", "tools"):
        for path in (REPO / folder).glob("*.py" if folder == "." else "**/*.py"):
            code = path.read_text(encoding="utf-8")
            if 'if __name__ == "__main__":' in code:
                scripts.append(path)
                assert "utils.run_script(main)" in code or "    protect()" in code, path
    assert len(scripts) > 10
