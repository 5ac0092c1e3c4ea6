"""The scripts themselves on GPUs: --fast, several processes, resuming, SIGTERM, full memory."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.refshapes.generate import generate
from lib.fast import fast_flags
from tests.cli.test_resume import assert_same
from tests.scripts import REPO, TIMEOUT, Shapes, environment, run, torchrun

pytestmark = pytest.mark.gpu
REQUEUE = 75


@pytest.fixture(scope="module")
def options(shapes: Shapes, device: torch.device) -> list[str]:
    """A run of a few steps, on the device."""
    return [*shapes.train_options, "--device", str(device)]


@pytest.fixture(scope="module")
def trained(
    options: list[str], processes: int, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder where --fast trained on all GPUs, and what it printed."""
    cwd = tmp_path_factory.mktemp("fast")
    words = [*options, "--fast", "--epochs", "1", "--batch-size", "2"]
    done = run(cwd, "train.py", *words, launcher=torchrun(processes))
    assert done.returncode == 0, done.stderr
    return cwd, done.stdout


def test_fast_trains(trained: tuple[Path, str], device: torch.device) -> None:
    flags = " ".join(fast_flags(str(device), "train.py"))
    assert f"--fast: {flags or 'no other flag here'}" in trained[1]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", trained[1])]
    assert losses
    assert max(losses) < 5


def test_fast_evaluates(trained: tuple[Path, str], options: list[str], processes: int) -> None:
    """With --fast; and in float32, on any number of GPUs with the same counts."""
    result = {}
    common = ["--resume", "checkpoints/model_best_lavt.pth", "--split", "val", "--batch-size", "2"]
    usable = options[: options.index("--text_from_scratch")] + options[-2:]
    for name, world in (("fast", 1), ("one", 1), ("all", processes)):
        if name == "all" and processes == 1:
            continue
        extra = ["--fast"] if name == "fast" else []
        launcher = torchrun(world) if world > 1 else ()
        words = [*usable, *common, *extra, "--results", f"{name}.json"]
        done = run(trained[0], "test.py", *words, launcher=launcher)
        assert done.returncode == 0, done.stderr
        result[name] = json.loads((trained[0] / f"{name}.json").read_text())["splits"]["val"]["all"]
    assert result.get("all", result["one"]) == result["one"]
    assert result["fast"]["samples"] == result["one"]["samples"] > 0


def test_ddp(device: torch.device, processes: int, tmp_path: Path) -> None:
    """NCCL (gloo in a rehearsal), synchronised batch norms, gradients, steps: see ddp.py."""
    done = run(tmp_path, "tests/gpu/ddp.py", device.type, launcher=torchrun(processes))
    assert done.returncode == 0, done.stderr
    backend = "nccl" if device.type == "cuda" else "gloo"
    assert len(re.findall(rf"ok \d+ {backend} ", done.stdout)) == processes


def test_stopped_by_sigterm_and_resumed_to_the_bit(
    device: torch.device, dry: bool, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    generate(root, level="easy", seed=3, scenes=16 if dry else 48, val_scenes=2, test_scenes=1)
    options = [*Shapes(root).train_options, "--device", str(device), "--deterministic"]
    options += ["--epochs", "2" if dry else "6", "--drop_path", "0.2", "--model_id"]
    done = run(tmp_path, "train.py", *options, "whole")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, str(REPO / "train.py"), *options, "parts", "--resume", "auto"]
    with (tmp_path / "output").open("w+") as output:
        job = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=output, stderr=output
        )
        try:
            wait_for_steps(tmp_path / "models/parts/metrics.jsonl", 3, job)
            job.send_signal(signal.SIGTERM)
            code = job.wait(60)
        finally:
            job.kill()
        output.seek(0)
        assert code == REQUEUE, output.read()
    done = run(tmp_path, "train.py", *options, "parts", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    states = []
    for name in ("whole", "parts"):
        path = tmp_path / f"checkpoints/model_last_{name}.pth"
        content = torch.load(path, weights_only=True, map_location="cpu")
        states.append({k: v for k, v in content.items() if k != "args"})
    assert_same(*states)


def wait_for_steps(metrics: Path, steps: int, job: subprocess.Popen[bytes]) -> None:
    """Until so many steps are logged."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and job.poll() is None:
        if metrics.is_file() and metrics.read_text().count('"step"') >= steps:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no {steps} steps")


def test_full_memory_is_one_line(options: list[str], device: torch.device, tmp_path: Path) -> None:
    """The process may take 30 MB of the GPU; in a rehearsal the error is raised by hand."""
    limit = "torch.cuda.set_per_process_memory_fraction(3e7 / torch.cuda.mem_get_info()[1])\n"
    by_hand = (
        "import lib.model\n"
        "def full(*args): raise torch.OutOfMemoryError('rehearsed')\n"
        "lib.model.Objective.forward = full\n"
    )
    script = f"import runpy, sys, torch\n{limit if device.type == 'cuda' else by_hand}"
    script += f"sys.argv = ['train.py', *sys.argv[1:]]\nrunpy.run_path({str(REPO / 'train.py')!r},"
    script += " run_name='__main__')\n"
    done = subprocess.run(
        [sys.executable, "-c", script, *options, "--epochs", "1", "--img_size", "224"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: the GPU's memory is full: lower --batch_size or --img_size"
    assert "Traceback" not in done.stderr
