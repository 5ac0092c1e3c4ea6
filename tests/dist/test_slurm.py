"""The Slurm script, with small stand-ins for Slurm's commands and a real training on two "nodes"."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.parity.same_run import run_differences
from tests.dist.conftest import PROCESSES as NODES
from tests.dist.conftest import Undisturbed
from tests.scripts import REPO, TIMEOUT, environment, jsonl

SCRIPT = REPO / "docs/slurm/train.sbatch"

# As Slurm's own: a task a node, options before the command, the worst exit code, and a SIGTERM of
# its own kills the tasks outright.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for _ in $(seq "$SLURM_JOB_NUM_NODES"); do
    "$@" & tasks+=($!)
done
trap 'kill -KILL "${tasks[@]}"' TERM
echo "${tasks[@]}" > step.pids
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
rm step.pids
exit "$code"
"""
# Signals the tasks of all steps, and not the batch script.
SCANCEL = """#!/bin/bash
[[ $1 == --signal=* && $2 == "$SLURM_JOB_ID" ]] && kill -"${1#--signal=}" $(cat step.pids)
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") for _ in $(seq "$SLURM_JOB_NUM_NODES"); do echo localhost; done ;;
    "requeue $SLURM_JOB_ID") echo "$2" >> requeued ;;
    *) exit 1 ;;
esac
"""
TORCHRUN = f"""#!/bin/sh
exec {sys.executable} -m torch.distributed.run "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    """A folder to submit from; Slurm's commands in ``bin``; no task outlives the test."""
    for name, text in {
        "srun": SRUN,
        "scancel": SCANCEL,
        "scontrol": SCONTROL,
        "torchrun": TORCHRUN,
    }.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text)
        command.chmod(0o755)
    (tmp_path / "train.py").symlink_to(REPO / "train.py")
    yield tmp_path
    with suppress(FileNotFoundError):
        for task in (tmp_path / "step.pids").read_text().split():
            os.kill(int(task), signal.SIGTERM)


def submit(cluster: Path, options: list[str], restarts: int) -> subprocess.Popen[str]:
    """What Slurm does when the job's turn has come."""
    slurm = {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        # Also the port follows from it, so that several test runs do not meet.
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": f"node[1-{NODES}]",
        "SLURM_JOB_NUM_NODES": str(NODES),
        "SLURM_RESTART_COUNT": str(restarts),
    }
    with (cluster / "job.txt").open("a") as output:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *options],
            cwd=cluster,
            env=environment() | slurm,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def test_the_script_is_sound() -> None:
    """Bash reads it, and it asks Slurm for the early signal, the queue and one output file."""
    assert subprocess.run(["bash", "-n", str(SCRIPT)], timeout=30).returncode == 0
    words = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line[:8] == "#SBATCH "]
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(words)


def test_stopped_by_the_time_limit_and_requeued(cluster: Path, undisturbed: Undisturbed) -> None:
    """Signalled, saved, requeued, finished: equal to the run that nothing stopped."""
    job = submit(cluster, undisturbed.options, restarts=0)
    metrics = cluster / "models/lavt/metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not (metrics.is_file() and metrics.stat().st_size) and job.poll() is None:
        assert time.monotonic() < deadline, (cluster / "job.txt").read_text()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    code = job.wait(timeout=TIMEOUT)
    output = (cluster / "job.txt").read_text()
    assert code != 0, output
    assert (cluster / "requeued").read_text().split() == [str(os.getpid())], output
    assert (cluster / "checkpoints/model_last_lavt.pth").is_file()
    assert jsonl(metrics)[-1]["step"] < undisturbed.steps

    again = submit(cluster, undisturbed.options, restarts=1)
    assert again.wait(timeout=TIMEOUT) == 0, (cluster / "job.txt").read_text()
    assert len((cluster / "requeued").read_text().split()) == 1
    assert run_differences(undisturbed.folder, cluster) == []


def test_a_failure_is_not_requeued(cluster: Path) -> None:
    """What would fail again must not go round for ever."""
    (cluster / "bin/torchrun").write_text("#!/bin/sh\nexit 1\n")
    assert submit(cluster, [], restarts=0).wait(timeout=TIMEOUT) == 1
    assert not (cluster / "requeued").exists()
