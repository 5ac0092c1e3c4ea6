"""Sessions and terminals that go away, loader processes that die: what is left and what is told."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import test as test_script
import train as train_script
import utils
from lib.evaluation import evaluator
from tests.scripts import REPO, TIMEOUT, Shapes, environment, jsonl


@pytest.fixture(scope="module")
def trained(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where one epoch was trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        train_script.main([*shapes.train_options, "--epochs", "1"])
        return Path.cwd()


def start(
    cwd: Path, script: str, *words: str, before: Sequence[str] = (), **streams: Any
) -> subprocess.Popen[str]:
    """A script in its own process, which is not waited for."""
    return subprocess.Popen(
        [*before, sys.executable, str(REPO / script), *words],
        cwd=cwd,
        env=environment() | streams.pop("variables", {}),
        text=True,
        **streams,
    )


def wait_for_line(log: Path, words: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not (log.is_file() and words in log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, f"no '{words}' in {log}"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["pipe", "terminal", "closed"])
def test_training_goes_on_without_a_reader(kind: str, shapes: Shapes, tmp_path: Path) -> None:
    """With a reader that leaves after some lines, a terminal that vanishes, and none at all."""
    with (tmp_path / "errors").open("w+") as errors:
        before: list[str] = []
        if kind == "terminal":
            ours, theirs = pty.openpty()
            streams: dict[str, Any] = {"stdout": theirs, "stderr": theirs}
        elif kind == "pipe":
            ours, theirs = os.pipe()
            streams = {"stdout": theirs, "stderr": errors}
        else:
            before = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash"]
            ours = theirs = os.open(os.devnull, os.O_RDWR)
            streams = {"stderr": errors}
        options = [*shapes.train_options, "--epochs", "2"]
        job = start(tmp_path, "train.py", *options, before=before, **streams)
        wait_for_line(tmp_path / "models/lavt/log.txt", "epoch 0 step 2/")
        for handle in {ours, theirs}:
            os.close(handle)
        assert job.wait(timeout=TIMEOUT) == 0
        errors.seek(0)
        assert errors.read() == ""
    log = (tmp_path / "models/lavt/log.txt").read_text()
    steps = [
        r["step"] for r in jsonl(tmp_path / "models/lavt/metrics.jsonl") if r["kind"] == "step"
    ]
    assert len(re.findall(r"epoch \d+ step \d+/", log)) == len(steps)
    assert "done: " in log


def test_a_demo_on_a_terminal_of_few_characters(
    trained: Path, shapes: Shapes, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "Zürich ☃.png")
    job = start(
        tmp_path,
        "demo_inference.py",
        *(
            "--image",
            "Zürich ☃.png",
            "--sentence",
            "a café ☃ with a very long name, or so it seems",
        ),
        *("--resume", str(trained / "checkpoints/model_last_lavt.pth"), *shapes.options[2:]),
        variables={"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 0, output
    assert "Z\\xfcrich \\u2603.png" in output


def test_results_are_written_before_words_about_them(
    trained: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []

    class Reader(io.StringIO):
        def write(self, text: str) -> int:
            if "Mean IoU is" in text:
                seen.append([*json.loads(Path("r.json").read_text())["splits"]])
                assert Path("r.md").is_file()
            return super().write(text)

    options = ["--resume", str(trained / "checkpoints/model_last_lavt.pth"), *shapes.options]
    with redirect_stdout(Reader()) as output:
        test_script.main([*options, "--split", "val,testA", "--results", "r.json"])
    assert seen == [["val"], ["val", "testA"]]
    assert output.getvalue().count("written: ") == 4


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_stream_that_is_none_or_closed(
    stream: str | None,
    trained: Path,
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = None
    if stream:
        gone = io.StringIO()
        gone.close()
    options = ["--resume", str(trained / "checkpoints/model_last_lavt.pth"), *shapes.options]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        patch.setattr(sys, "stderr", gone)
        test_script.main([*options, "--split", "testA", "--results", "r.json"])
    assert Path("r.json").is_file()


@pytest.mark.parametrize("script", [train_script, test_script])
def test_a_loader_process_killed_in_an_evaluation(
    script: Any,
    trained: Path,
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    real = evaluator.expression_logits

    def kill(*args: Any) -> Any:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(evaluator, "expression_logits", kill)
    resume = ["--resume", str(trained / "checkpoints/model_last_lavt.pth"), "--split", "val"]
    options = [*shapes.train_options, "--epochs", "1"]
    options = options if script is train_script else [*resume, *shapes.options]
    with pytest.raises(SystemExit) as ended:
        utils.run_script(lambda argv: script.main([*options, "--workers", "1"]))
    assert ended.value.code == 3
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a loader process failed (killed by signal: Killed); ")


def test_a_closed_session_ends_an_evaluation(trained: Path, shapes: Shapes, tmp_path: Path) -> None:
    """There is nothing to save."""
    options = ["--resume", str(trained / "checkpoints/model_last_lavt.pth"), *shapes.options]
    job = start(
        tmp_path,
        "test.py",
        *(*options, "--split", "val", "--workers", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert job.stdout is not None
    job.stdout.readline()
    job.send_signal(signal.SIGHUP)
    errors = job.communicate(timeout=TIMEOUT)[1]
    assert job.returncode == -signal.SIGHUP
    assert "Traceback" not in errors
