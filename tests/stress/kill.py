"""Kill a training run at random moments, resume it each time, compare it with an undisturbed one.

    python -m tests.stress.kill --kills 30 --processes 1 2

A small LAVT learns a few generated images, saving every second step. Each attempt is a process,
or several over gloo, that SIGKILL ends: at its start, at a step, in validation, and most of all
while it saves. After each kill every state file must be whole; at the end weights, optimizer,
schedule, best score and metrics lines must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

import train
import utils
from args import Parser
from data.refshapes.generate import generate
from lib import checkpoint
from lib.errors import InputError
from lib.training.state_files import StateFiles
from tests.parity.same_run import run_differences
from utils import log

REPO = Path(__file__).parents[2]
MODEL_ID = "lavt"
STEPS = 5  # of an epoch, with this data and batch size
SAVE_EVERY = 2
BATCH = 4  # of all processes
OUTPUT = "output.txt"  # what a run prints
POLL = 0.0005  # seconds
# Of every ten kills, so that even a few meet a save.
KINDS = ["writing", "step"] * 3 + ["writing", "renamed", "step", "start-up"]
PATIENCE = 300.0  # seconds without the moment that was waited for


@dataclass(frozen=True)
class Aim:
    """The moment chosen for a kill.

    Attributes:
        kind: 'start-up', 'step', 'writing' or 'renamed'.
        step: of the whole run, from which on it may happen.
        delay: 0 to 1; how much of a start, a log interval or a save passes before it does.
    """

    kind: str
    step: int
    delay: float


@dataclass
class Kill:
    """What a kill met.

    Attributes:
        number: from 1.
        aim: kind of moment that it was meant for.
        during: what it interrupted.
        logged: steps that the run had logged.
        state: which file the run continues from; 'none' starts fresh.
        step: that state's.
        faults: state files that cannot be read, or progress that is gone.
    """

    number: int
    aim: str
    during: str
    logged: int
    state: str
    step: int
    faults: list[str]


class Job:
    """Processes that train in ``folder``, forked from this one, which has imported everything."""

    def __init__(self, argv: Sequence[str], folder: Path, world: int) -> None:
        self.log = folder / OUTPUT
        self.log.write_text("")
        self.began = time.monotonic()
        port = _free_port()
        self.pids: list[int] = []
        for rank in range(world):
            sys.stdout.flush()
            pid = os.fork()
            group = self.pids[0] if self.pids else 0
            if pid == 0:
                _become(argv, folder, self.log, rank, world, port, group)
            os.setpgid(pid, group or pid)
            self.pids.append(pid)
        self.codes: dict[int, int] = {}

    def ended(self) -> bool:
        """Whether all its processes have ended.

        Raises:
            InputError: one of them failed; its last lines say why.
        """
        for pid in self.pids:
            if pid not in self.codes and (actual := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid] = os.waitstatus_to_exitcode(actual[1])
        if any(self.codes.values()):
            self.kill()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise InputError(
                f"training failed with exit codes {list(self.codes.values())}:\n{tail}"
            )
        return len(self.codes) == len(self.pids)

    def kill(self) -> None:
        """SIGKILL for the whole group."""
        with_signal = [pid for pid in self.pids if pid not in self.codes]
        if with_signal:
            os.killpg(self.pids[0], signal.SIGKILL)
        for pid in with_signal:
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(
    argv: Sequence[str], folder: Path, output: Path, rank: int, world: int, port: int, group: int
) -> NoReturn:
    """Turn this forked process into train.py, and end with it."""
    code = 1
    try:
        os.setpgid(0, group)
        os.chdir(folder)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["train.py", *argv]
        utils.run_script(train.main)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Watch:
    """What a run's folder tells of the run, cheap enough to ask all the time."""

    def __init__(self, folder: Path) -> None:
        self.files = StateFiles(folder / "checkpoints", MODEL_ID)
        self.partial = self.files.last.with_name(self.files.last.name + ".partial")
        self.metrics = folder / "models" / MODEL_ID / "metrics.jsonl"
        self.output = folder / OUTPUT
        # Left by earlier kills; what is being written now looks different.
        self.old_partial, self.old_last = _stamp(self.partial), _stamp(self.files.last)
        self.old_states = self._states()

    def started(self) -> bool:
        """Whether everything is built, and training has begun."""
        return self.output.is_file() and b" steps per epoch" in self.output.read_bytes()

    def saving(self) -> bool:
        """Whether a state is being written."""
        return _stamp(self.partial) not in (None, self.old_partial)

    def renamed(self) -> bool:
        """Whether a new state has appeared since the last time this was asked."""
        before, self.old_last = self.old_last, _stamp(self.files.last)
        return self.old_last != before

    def touched(self) -> bool:
        """Whether anything among the states is another since the last time this was asked."""
        before, self.old_states = self.old_states, self._states()
        return self.old_states != before

    def _states(self) -> dict[str, tuple[int, int, int] | None]:
        folder = self.files.last.parent
        return {p.name: _stamp(p) for p in folder.iterdir()} if folder.is_dir() else {}

    def last_record(self) -> dict[str, Any]:
        """The newest whole line of the metrics; {} if there is none."""
        if not self.metrics.is_file():
            return {}
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1]
        return json.loads(lines[-1]) if lines else {}

    def during(self) -> str:
        """What a run that was just killed was doing."""
        record = self.last_record()
        if not self.started():
            return "start-up"
        if self.saving():
            return "saving"
        ended = record.get("kind") == "step" and record["step"] % STEPS == 0
        return "validation" if ended else "epoch"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@dataclass
class Pace:
    """Seconds that things take here, so that a kill's delay falls into them."""

    start: float
    interval: float
    save: float


def wait_for(aim: Aim, job: Job, watch: Watch, pace: Pace) -> bool:
    """Wait for the moment; False if the run ended before it."""
    deadline = time.monotonic() + PATIENCE
    while not job.ended() and not watch.started():
        if aim.kind == "start-up" and time.monotonic() > job.began + pace.start * aim.delay:
            return True
        _breathe(deadline)
    if aim.kind == "start-up":
        return not job.ended()
    pace.start = time.monotonic() - job.began
    arrived, length = {
        "step": (lambda: True, pace.interval),
        # Any change, not that of a certain file: how states are written is on trial.
        "writing": (watch.touched, pace.save),
        "renamed": (watch.renamed, 0.0),
    }[aim.kind]
    while not job.ended() and watch.last_record().get("step", 0) < aim.step:
        _breathe(deadline)
    arrived()  # from now on
    while not job.ended():
        if arrived():
            time.sleep(length * aim.delay)
            return not job.ended()
        _breathe(deadline)
    return False


def _breathe(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise InputError(f"nothing happened in {PATIENCE:.0f} seconds")
    time.sleep(POLL)


def plan(kills: int, steps: int, rng: random.Random) -> list[Aim]:
    """Moments in the order in which the run comes to them; half of them while it saves."""
    drawn = [KINDS[i % len(KINDS)] for i in range(kills)]
    rng.shuffle(drawn)
    at = sorted(rng.randrange(1, steps - STEPS) for _ in range(kills))
    return [Aim(kind, step, rng.random()) for kind, step in zip(drawn, at, strict=True)]


def options(data: Path, world: int, epochs: int) -> list[str]:
    """train.py's, for a run of ``epochs`` times :data:`STEPS` steps."""
    bert = str(data / "bert")
    source = ["--refer_data_root", str(data), "--ck_bert", bert, "--bert_tokenizer", bert]
    model = ["--swin_type", "micro", "--img_size", "56", "--ape", "14", "--text_from_scratch"]
    recipe = ["--lang_layers", "all", "--loss", "dice", "--lr", "1e-3", "--device", "cpu"]
    batches = ["--batch-size", str(BATCH // world), "--workers", "0", "--epochs", str(epochs)]
    # Log lines and states do not come at the same steps, which is the harder case.
    return [
        *source,
        *model,
        *recipe,
        *batches,
        "--print-freq",
        "3",
        "--save-every",
        str(SAVE_EVERY),
    ]


def undisturbed(argv: Sequence[str], folder: Path, world: int) -> Pace:
    """Train as a user would, and measure how long things take."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command = [sys.executable, *(launcher if world > 1 else []), str(REPO / "train.py"), *argv]
    folder.mkdir()
    watch, states, saving = Watch(folder), 0, 0.0
    began = mark = time.monotonic()
    started = 0.0
    with (folder / OUTPUT).open("w") as output:
        child = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            now = time.monotonic()
            saving += (now - mark) * watch.saving()
            states += watch.renamed()
            started = started or (now if watch.started() else 0.0)
            mark = now
            time.sleep(POLL)
    if child.returncode:
        raise InputError(f"training failed:\n{(folder / OUTPUT).read_text()[-3000:]}")
    lines = len(watch.metrics.read_text().splitlines())
    return Pace(started - began, (mark - started) / lines, saving / max(states, 1))


def check(number: int, aim: Aim, watch: Watch, before: int) -> Kill:
    """Look at what a kill left.

    Args:
        number: of the kill.
        aim: of the kill.
        watch: of the run.
        before: step of the state that the killed attempt continued from.
    """
    kill = Kill(number, aim.kind, watch.during(), watch.last_record().get("step", 0), "none", 0, [])
    for path in (watch.files.last, watch.files.previous, watch.files.best):
        try:
            if path.exists():
                checkpoint.read_checkpoint(path)
        except InputError as e:
            kill.faults.append(str(e))
    newest, _ = watch.files.newest()
    if newest is not None:
        content = checkpoint.read_checkpoint(newest)
        kill.step = (content["epoch"] + 1) * STEPS + content["progress"]["step"]
        kill.state = newest.name.split("_")[1]
    if kill.step < before:
        kill.faults.append(f"the newest state is of step {kill.step}; it was of {before} before")
    return kill


def disturbed(
    argv: Sequence[str], folder: Path, world: int, aims: Sequence[Aim], pace: Pace
) -> list[Kill]:
    """Train, killed at every aim."""
    folder.mkdir()
    kills: list[Kill] = []
    argv = [*argv, "--resume", "auto"]
    for aim in utils.progress(aims, f"kills, {world} process(es)", 0):
        watch, job = Watch(folder), Job(argv, folder, world)
        try:
            if not wait_for(aim, job, watch, pace):
                return kills
        finally:
            job.kill()
        kills.append(check(len(kills) + 1, aim, watch, kills[-1].step if kills else 0))
    job = Job(argv, folder, world)
    try:
        while not job.ended():
            time.sleep(0.01)
    finally:
        job.kill()
    return kills


def experiment(data: Path, folder: Path, world: int, kills: int, seed: int) -> dict[str, Any]:
    """One run of ``world`` processes, disturbed and undisturbed."""
    began = time.monotonic()
    epochs = max(3, kills // 3)
    argv = options(data, world, epochs)
    folder.mkdir()
    pace = undisturbed(argv, folder / "undisturbed", world)
    aims = plan(kills, epochs * STEPS, random.Random(seed))
    done = disturbed(argv, folder / "killed", world, aims, pace)
    unequal = run_differences(folder / "undisturbed", folder / "killed", MODEL_ID)
    print(table(done))
    for fault in [*(fault for kill in done for fault in kill.faults), *unequal][:20]:
        print("fault:", fault)
    return {
        "processes": world,
        "steps": epochs * STEPS,
        "kills": len(done),
        "during": dict(Counter(kill.during for kill in done)),
        "continued_from": dict(Counter(kill.state for kill in done)),
        "steps_lost": sum(max(0, kill.logged - kill.step) for kill in done),
        "faults": [fault for kill in done for fault in kill.faults],
        "equal": not unequal,
        "seconds": round(time.monotonic() - began, 1),
        "each": [asdict(kill) for kill in done],
    }


def table(kills: Sequence[Kill]) -> str:
    """A line for each kill."""
    head = f"{'kill':>4}  {'aim':<9} {'interrupted':<11} {'logged step':>11}  continues from"
    rows = [
        f"{k.number:>4}  {k.aim:<9} {k.during:<11} {k.logged:>11}  {k.state}, step {k.step}"
        for k in kills
    ]
    return "\n".join([head, *rows])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(prog="tests.stress.kill", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--kills", type=int, default=30, help="for each number of processes")
    p.add_argument("--processes", type=int, nargs="+", default=[1])
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--output", default="benchmarks/results/kill.json", help="JSON file")
    args = p.parse_args(argv)
    if args.kills < 1:
        raise InputError(f"--kills must be at least 1, not {args.kills}")
    if any(world not in (1, 2, 4) for world in args.processes):
        raise InputError(f"--processes must divide a batch of {BATCH}: 1, 2 or 4")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiments; exit code 1 if a killed run lost or changed anything."""
    args = parse(argv)
    utils.setup_logging(None, 0)
    # One thread in both kinds of process: with more, sums could come out otherwise.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread and fork do not go together
    results = []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        generate(data, level="easy", seed=3, scenes=8, val_scenes=3, test_scenes=2)
        for world in args.processes:
            folder = Path(name) / f"processes{world}"
            results.append(experiment(data, folder, world, args.kills, args.seed))
    utils.write_json({"runs": results, "environment": utils.environment()}, args.output)
    for result in results:
        during = ", ".join(f"{n} in {what}" for what, n in sorted(result["during"].items()))
        end = "equal to the undisturbed run" if result["equal"] else "NOT EQUAL"
        log.info(
            "%d processes: %d kills (%s): %s", result["processes"], result["kills"], during, end
        )
    log.info("written: %s", args.output)
    if not all(r["equal"] and not r["faults"] and r["kills"] == args.kills for r in results):
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main)
