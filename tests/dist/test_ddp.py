"""Several processes on this machine: gloo, CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.dist import gradients
from tests.scripts import REPO, TIMEOUT, Shapes, environment, jsonl, run, torchrun


@pytest.mark.parametrize(
    ("name", "world", "backend"),
    [
        ("lavt_one", 2, []),
        ("lavt_one", 3, []),
        ("lavt_one", 2, ["aot_eager"]),
        ("crossvlt", 2, []),
        ("lavt_one decoder_features=V pwam_norm=batch pwam_combine=words", 2, []),
        ("lavt lang_path=off fusion=concat", 2, []),
        ("lavt_one maskris", 2, []),
        ("crossvlt maskris", 3, []),
    ],
)
def test_gradient_is_the_mean_over_the_shards(
    name: str, world: int, backend: list[str], tmp_path: Path
) -> None:
    """DDP's gradient equals what single processes find on their shards, averaged.

    Also that of a compiled model: ``backend`` is torch.compile's.
    """
    script = ("tests/dist/gradients.py", name, str(tmp_path), *backend)
    done = run(tmp_path, *script, launcher=torchrun(world))
    assert done.returncode == 0, done.stderr
    singles = [gradients.gradients(name, rank) for rank in range(world)]
    trained = {n for n, p in gradients.model(name).named_parameters() if p.requires_grad}
    for rank in range(world):
        result = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        # Exactly the trained parameters have one: nothing needs a search for unused ones.
        assert set(result) == set(singles[0]) == trained
        for key, value in result.items():
            mean = torch.stack([single[key] for single in singles]).mean(0)
            torch.testing.assert_close(value, mean, rtol=1e-9, atol=1e-12, msg=key)


@pytest.fixture(scope="module")
def trained(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where two processes trained for one epoch."""
    cwd = tmp_path_factory.mktemp("ddp")
    done = run(
        cwd,
        "train.py",
        *shapes.train_options,
        *("--epochs", "1", "--model_id", "ddp", "--batch-size", "2"),
        launcher=torchrun(2),
    )
    assert done.returncode == 0, done.stderr
    return cwd


def test_only_one_process_writes(trained: Path) -> None:
    steps = [r["step"] for r in jsonl(trained / "models/ddp/metrics.jsonl") if r["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    log = (trained / "models/ddp/log.txt").read_text().splitlines()
    assert len([line for line in log if "step 1/" in line]) == 1
    written = sorted(p.name for p in (trained / "checkpoints").iterdir())
    assert written == ["model_best_ddp.pth", "model_last_ddp.pth"]


def test_counts_are_equal_for_any_number_of_processes(trained: Path, shapes: Shapes) -> None:
    """Also when neither samples nor batches divide evenly: nothing padded, nothing dropped."""
    result = {}
    for world in (1, 2, 3):
        out = trained / f"results{world}.json"
        done = run(
            trained,
            "test.py",
            *shapes.options,
            *("--resume", "checkpoints/model_best_ddp.pth", "--split", "val", "--control"),
            *("--batch-size", "4", "--results", str(out)),
            launcher=torchrun(world) if world > 1 else (),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Mean IoU is") == 1
        result[world] = json.loads(out.read_text())["splits"]
    samples = result[1]["val"]["all"]["samples"]
    assert samples % 2 or samples % 3 or -(-samples // 4) % 2
    assert result[1] == result[2] == result[3]


@pytest.mark.parametrize(
    "options", [["--eval_mode", "mean", "--eval_size", "original"], ["--eval_mode", "cat"]]
)
def test_predictions_are_equal_for_any_number_of_processes(
    options: list[str], trained: Path, shapes: Shapes
) -> None:
    """One file in the dataset's order, byte for byte, and the same counts."""
    result = []
    for world in (1, 2, 3):
        done = run(
            trained,
            "test.py",
            *(*shapes.options, *options, "--split", "val,testA", "--batch-size", "2"),
            *("--resume", "checkpoints/model_best_ddp.pth", "--control"),
            *("--results", f"of{world}/r.json", "--predictions", f"of{world}/p.jsonl"),
            launcher=torchrun(world) if world > 1 else (),
        )
        assert done.returncode == 0, done.stderr
        folder = trained / f"of{world}"
        splits = json.loads((folder / "r.json").read_text())["splits"]
        result.append((splits, (folder / "p.jsonl").read_bytes()))
        assert sorted(p.suffix for p in folder.iterdir()) == [
            *(".csv", ".json", ".jsonl", ".md", ".tex")
        ]
    assert result[0] == result[1] == result[2]
    lines = result[0][1].decode().splitlines()
    assert len(lines) == sum(rows["all"]["samples"] for rows in result[0][0].values())
    assert len(lines) > 2 * 2  # more than one batch a process


@pytest.mark.parametrize("dashes", ["--local_rank=0", "--local-rank=0"])
def test_both_spellings_of_local_rank(
    dashes: str, trained: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import test as test_script

    monkeypatch.chdir(trained)
    test_script.main(
        [
            *(dashes, "--split", "testA", "--resume", "checkpoints/model_best_ddp.pth"),
            *("--results", "local_rank.json", *shapes.options),
        ]
    )
    assert json.loads((trained / "local_rank.json").read_text())["splits"]["testA"]


def test_published_launcher(shapes: Shapes, tmp_path: Path) -> None:
    """``python -m torch.distributed.launch``, which hands ``--local-rank`` to the script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", port]
    options = ["--epochs", "1", "--batch-size", "4", "--stop_after", "1"]
    done = run(tmp_path, "train.py", *shapes.train_options, *options, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints/model_best_lavt.pth").is_file()


def test_a_dead_process_takes_the_job_down(shapes: Shapes, tmp_path: Path) -> None:
    """No hang: the launcher ends with an error that names the signal."""
    options = [*shapes.train_options, "--epochs", "1000", "--eval_every", "1000"]
    with (tmp_path / "output").open("w+") as output:
        job = subprocess.Popen(
            [sys.executable, *torchrun(2), str(REPO / "train.py"), *options, "--batch-size", "2"],
            cwd=tmp_path,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            worker = _last_worker(job.pid, tmp_path / "models/lavt/metrics.jsonl")
            os.kill(worker, signal.SIGKILL)
            assert job.wait(timeout=60) != 0
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        output.seek(0)
        assert "SIGKILL" in output.read()
    assert not _alive(worker)


def _last_worker(launcher: int, started: Path) -> int:
    """The process id of the launcher's last child, once training steps are logged."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        if len(children) >= 2 and started.is_file() and started.stat().st_size:
            return int(children[-1])
        time.sleep(0.2)
    raise TimeoutError("training never started")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
