"""torchrun's restarts and signals: a run continues as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.dist.conftest import PROCESSES, Undisturbed
from tests.parity.same_run import run_differences
from tests.scripts import REPO, TIMEOUT, environment, jsonl, run, torchrun

METRICS = "models/lavt/metrics.jsonl"


@contextmanager
def training(
    cwd: Path,
    *options: str,
    restarts: int = 0,
    before: Sequence[str] = (),
    launching: Sequence[str] = (),
) -> Iterator[subprocess.Popen[str]]:
    """``torchrun`` with train.py in ``cwd``, its words in ``output.txt``; ended on leaving."""
    launcher = [*torchrun(PROCESSES), "--max-restarts", str(restarts), *launching]
    with (cwd / "output.txt").open("a") as output:
        job = subprocess.Popen(
            [*before, sys.executable, *launcher, str(REPO / "train.py"), *options],
            cwd=cwd,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield job
    finally:
        # Each worker leads a process group of its own.
        for group in workers(job) if job.poll() is None else []:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        job.kill()
        job.wait()


def workers(job: subprocess.Popen[str]) -> list[int]:
    """Process ids of a launcher's training processes."""
    return children(job.pid)


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for_step(job: subprocess.Popen[str], cwd: Path, step: int) -> None:
    """Wait until this step is logged, and see that the training still runs."""
    deadline = time.monotonic() + TIMEOUT
    metrics = cwd / METRICS
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        assert job.poll() is None, (cwd / "output.txt").read_text()
        assert time.monotonic() < deadline, (cwd / "output.txt").read_text()
        time.sleep(0.02)


def test_a_killed_worker_comes_back(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Killed in the middle of an epoch; the launcher starts all processes again."""
    with training(tmp_path, *undisturbed.options, restarts=2) as job:
        wait_for_step(job, tmp_path, 8)
        os.kill(workers(job)[-1], signal.SIGKILL)
        assert job.wait(timeout=TIMEOUT) == 0, (tmp_path / "output.txt").read_text()
    log = (tmp_path / "models/lavt/log.txt").read_text()
    assert log.count("resuming checkpoints/model_last_lavt.pth") == 1
    assert run_differences(undisturbed.folder, tmp_path) == []


def test_sigterm_to_the_launcher_saves(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """It reaches the loaders' processes too, which must outlive the step."""
    options = [*undisturbed.options, "--workers", "1", "--resume", "auto"]
    with training(tmp_path, *options, restarts=2) as job:
        wait_for_step(job, tmp_path, 3)
        job.terminate()
        assert job.wait(timeout=TIMEOUT) != 0
    output = (tmp_path / "output.txt").read_text()
    assert "SIGTERM: stopping after this step" in output
    assert "saved: checkpoints/model_last_lavt.pth" in output
    stopped_at = jsonl(tmp_path / METRICS)[-1]["step"]
    assert 3 <= stopped_at < undisturbed.steps
    again = run(tmp_path, "train.py", *options, launcher=torchrun(PROCESSES))
    assert again.returncode == 0, again.stderr
    # Every step is logged, and none was made twice.
    log = (tmp_path / "models/lavt/log.txt").read_text()
    assert len(re.findall(r"epoch \d+ step \d+/", log)) == undisturbed.steps
    assert run_differences(undisturbed.folder, tmp_path) == []


def test_a_signal_to_one_process_stops_all_at_one_step(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """As from somebody who knows only one process' number."""
    options = [*undisturbed.options, "--resume", "auto"]
    with training(tmp_path, *options) as job:
        wait_for_step(job, tmp_path, 3)
        os.kill(workers(job)[1], signal.SIGUSR1)
        assert job.wait(timeout=TIMEOUT) != 0
    output = (tmp_path / "output.txt").read_text()
    assert "exitcode  : 75" in output
    assert "saved: checkpoints/model_last_lavt.pth" in output
    again = run(tmp_path, "train.py", *options, launcher=torchrun(PROCESSES))
    assert again.returncode == 0, again.stderr
    assert run_differences(undisturbed.folder, tmp_path) == []


def test_a_closed_session_saves(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Under nohup too: torchrun handles SIGHUP itself, and hands it on."""
    options = [*undisturbed.options, "--workers", "1", "--resume", "auto"]
    with training(tmp_path, *options, restarts=2, before=["nohup"]) as job:
        wait_for_step(job, tmp_path, 3)
        job.send_signal(signal.SIGHUP)
        assert job.wait(timeout=TIMEOUT) != 0
    output = (tmp_path / "output.txt").read_text()
    assert "SIGHUP: stopping after this step" in output
    assert "saved: checkpoints/model_last_lavt.pth" in output
    assert 3 <= jsonl(tmp_path / METRICS)[-1]["step"] < undisturbed.steps
    again = run(tmp_path, "train.py", *options, launcher=torchrun(PROCESSES))
    assert again.returncode == 0, again.stderr
    assert run_differences(undisturbed.folder, tmp_path) == []


def test_a_closed_session_is_survived(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The documented way: a torchrun that leaves SIGHUP to nohup."""
    launching = ["--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"]
    with training(tmp_path, *undisturbed.options, before=["nohup"], launching=launching) as job:
        wait_for_step(job, tmp_path, 3)
        for process in [job.pid, *workers(job)]:
            os.kill(process, signal.SIGHUP)
        assert job.wait(timeout=TIMEOUT) == 0, (tmp_path / "output.txt").read_text()
    assert run_differences(undisturbed.folder, tmp_path) == []


def test_a_killed_loader_process_is_told(undisturbed: Undisturbed, tmp_path: Path) -> None:
    with training(tmp_path, *undisturbed.options, "--workers", "1") as job:
        wait_for_step(job, tmp_path, 3)
        [loader, *_] = children(workers(job)[1])
        os.kill(loader, signal.SIGKILL)
        assert job.wait(timeout=TIMEOUT) != 0
    output = (tmp_path / "output.txt").read_text()
    assert output.count("a loader process failed (") == 1, output
    assert "[rank" not in output  # torch's prefix of a traceback's lines
