"""Fuzzing: thousands of damaged and hostile files and command lines, and what must hold of all.

    python -m tests.stress.fuzz --cases 10000 [--seed N] [--target pickles,images] [--jobs N]

A case may be accepted, or refused with InputError. Anything else is a finding: another exception,
a crash of the process, more than 10 seconds, more than a gigabyte, a program started, a connection,
a file made or removed outside of the case's folder, a payload's mark. Cases come from sound files
with small damage (benchmarks/fuzz_cases.py), drawn with hypothesis; the same seed draws the same.
Needs requirements-dev.txt. Exits with 1 where there are findings, and says how to see each again:

    python -m tests.stress.fuzz --target images --replay fuzz_findings/images-1.bin
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

import utils
from args import Parser
from lib.errors import InputError
from tests.stress.fuzz_cases import MARKER, TARGETS, Sound, Target

SECONDS = 10  # for one case
STUCK = 60  # seconds without a new case, after which even native code is ended
GROWTH = 1 << 20  # of the peak memory by one case, kilobytes
ROOM = 6 << 30  # of address space; more would end other programs, too
MAX_FINDINGS = 20  # kept of each target; alike ones count once
ROOT = Path(__file__).parent.parent


class TooSlow(BaseException):
    """Not an Exception: readers turn those into InputError."""


@dataclass
class Tally:
    """What came of a target's cases.

    Attributes:
        findings: a line each, with the file that has the case.
    """

    target: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Take another tally's numbers in."""
        self.cases += other.cases
        self.accepted += other.accepted
        self.refused += other.refused
        self.seconds += other.seconds
        self.findings = {**other.findings, **self.findings}


class Watch:
    """An audit hook that notes what no reader of files has to do.

    Args:
        folder: where files may be made and removed.
    """

    FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.")
    CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "shutil.")

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(details[0], str | bytes) and _writes(details)
        if event.startswith(self.FORBIDDEN):
            self.seen.append(f"{event} {details!r:.80}")
        elif (writes or event.startswith(self.CHANGES)) and not self._inside(details[0]):
            self.seen.append(f"{event} of {details[0]!r:.80}")

    def _inside(self, path: Any) -> bool:
        with contextlib.suppress(TypeError, ValueError):
            full = os.path.abspath(os.fsdecode(path))
            return full == os.devnull or full.startswith(self.folder + os.sep)
        return False


def _writes(details: tuple[Any, ...]) -> bool:
    mode, flags = details[1], details[2]
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    return bool(flags & changing) if mode is None else bool(set("wax+") & set(mode))


def judge(target: Target, case: bytes, folder: Path, watch: Watch) -> tuple[str, str]:
    """Run one case.

    Returns:
        'accepted' or 'refused' and '', or 'finding' and what it is.
    """
    utils.forget_peak_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch.seen = []
    verdict, finding = "accepted", ""
    try:
        with _watched(watch):
            target.read(case, folder)
    except InputError as error:
        verdict, finding = "refused", "" if _is_clear(str(error)) else f"unclear: {error!s:.100}"
    except TooSlow:
        finding = f"more than {SECONDS} seconds"
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        finding = f"{type(error).__name__} at {place}: {str(error)[:120]!r}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if watch.seen:
        finding = watch.seen[0]
    elif (folder / MARKER).exists() or Path(MARKER).exists():
        finding = "a payload was run"
        (folder / MARKER).unlink(missing_ok=True)
    elif grown > GROWTH and not finding:
        finding = f"{grown >> 10} MB of memory"
    finding = finding.encode("ascii", "backslashreplace").decode()
    return ("finding", finding) if finding else (verdict, "")


@contextlib.contextmanager
def _watched(watch: Watch) -> Iterator[None]:
    """Watch, and raise TooSlow after `SECONDS`: inside alone, not while a result is noted."""

    def too_slow(*_: Any) -> None:
        if watch.on:
            raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watch.on = True
    try:
        yield
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_clear(message: str) -> bool:
    return bool(message) and message.isprintable() and "Traceback" not in message


def run_cases(target: Target, name: str, cases: int, seed: int, folder: Path) -> Tally:
    """Draw and run cases in this process, which keeps the current one in a file."""
    tally, watch = Tally(name), Watch(folder)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(target.cases)
    def run_one(case: bytes) -> None:
        (folder / "case.bin").write_bytes(case)
        began = time.perf_counter()
        verdict, finding = judge(target, case, folder, watch)
        tally.seconds += time.perf_counter() - began
        tally.cases += 1
        tally.accepted += verdict == "accepted"
        tally.refused += verdict == "refused"
        if finding and finding not in tally.findings and len(tally.findings) < MAX_FINDINGS:
            tally.findings[finding] = str(_keep(case, folder, f"finding-{len(tally.findings)}"))
        (folder / "tally.json").write_text(json.dumps(asdict(tally)))

    run_one()
    return tally


def _keep(case: bytes, folder: Path, name: str) -> Path:
    path = folder / f"{name}.bin"
    path.write_bytes(case)
    return path


def _child(make: Callable[[], Target], name: str, cases: int, seed: int, folder: Path) -> None:
    """The process that a batch runs in, for it may die."""
    gc.collect()  # what the parent left, lest freeing it later hides what a case takes
    torch.set_num_threads(1)
    os.chdir(folder)
    with open("output.txt", "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    target = make()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    run_cases(target, name, cases, seed, folder)
    os._exit(0)  # the parent's threads, which a usual exit waits for, are not here


def run_batch(
    make: Callable[[], Target], name: str, cases: int, seed: int, folder: Path, stuck: float = STUCK
) -> Tally:
    """Run cases in a process of their own; one that dies or hangs is a finding, and replaced.

    Args:
        make: the target, made in that process.
        name: of the target.
        cases: how many.
        seed: of hypothesis.
        folder: to work in.
        stuck: seconds that a case may take in native code.
    """
    total = Tally(name)
    while total.cases < cases and len(total.findings) < MAX_FINDINGS:
        part = folder / str(seed)
        part.mkdir(parents=True)
        child = multiprocessing.get_context("fork").Process(
            target=_child, args=(make, name, cases - total.cases, seed, part.resolve())
        )
        child.start()
        hung = _wait(child, part, stuck)
        done = Tally(name)
        if (part / "tally.json").is_file():
            done = Tally(**json.loads((part / "tally.json").read_text()))
        if hung or child.exitcode:
            case = part / "case.bin"
            if not case.is_file():
                raise RuntimeError(f"fuzzing {name} failed: {(part / 'output.txt').read_text()}")
            done.cases += 1
            what = f"over {stuck} seconds in native code" if hung else f"exit code {child.exitcode}"
            told = (part / "output.txt").read_text(errors="replace").strip()[-200:]
            done.findings[f"the process ended: {what} {told!r}"] = str(case)
        total.add(done)
        if not done.cases:
            break
        seed += 1_000_003
    return total


def _wait(child: Any, folder: Path, stuck: float) -> bool:
    """Wait for the process; True where it had to be ended."""
    while child.is_alive():
        child.join(0.2)
        current = folder / "case.bin"
        if current.is_file() and time.time() - current.stat().st_mtime > stuck:
            child.kill()
            child.join()
            return True
    return False


# Real processes

SCRIPTS = (
    ("train.py", "--epochs", "nan"),
    ("train.py", "--refer_data_root", "nowhere\x1b[2J", "--text_from_scratch"),
    ("test.py", "--resume", "hostile.pth"),
    ("test.py", "--split", "val,,val", "--resume", "x"),
    ("demo_inference.py", "--image", "a\nb.jpg", "--sentence", "", "--resume", "x.pth"),
    ("demo_inference.py", "--list", "hostile.json", "--resume", "hostile.pth"),
)


def run_scripts(folder: Path, sound: Sound) -> Tally:
    """Start the scripts themselves: exit code 2, and one line of error."""
    tally, began = Tally("scripts"), time.perf_counter()
    os.makedirs(folder, exist_ok=True)
    (folder / "hostile.pth").write_bytes(b"cos\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR.")
    (folder / "hostile.json").write_text("[" * 100_000)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    bert = str(sound.root / "bert")
    data = ["--refer_data_root", str(sound.root), "--ck_bert", bert, "--bert_tokenizer", bert]
    for script, *argv in SCRIPTS:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *data, "--device", "cpu", *argv],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        tally.cases += 1
        clear = done.returncode == 2 and done.stderr.startswith("error: ")
        clear = clear and done.stderr.count("\n") == 1 and _is_clear(done.stderr.strip())
        if clear and not (folder / MARKER).exists():
            tally.refused += 1
        else:
            command = " ".join([script, *argv])
            tally.findings[f"{command!r}: exit {done.returncode}, {done.stderr[-200:]!r}"] = command
    tally.seconds = time.perf_counter() - began
    return tally


# The benchmark


def fuzz(names: Sequence[str], cases: int, seed: int, jobs: int, folder: Path) -> list[Tally]:
    """Divide cases among targets and processes."""
    sound = Sound(folder)
    batches = [
        (name, share, seed + 7919 * i)
        for i, (name, share) in enumerate(
            (name, share) for name in names for share in _shares(cases // len(names), 4)
        )
    ]

    def run(batch: tuple[str, int, int]) -> Tally:
        name, share, its_seed = batch
        return run_batch(
            lambda: TARGETS[name](sound), name, share, its_seed, folder / f"{name}-{its_seed}"
        )

    tallies = {name: Tally(name) for name in names}
    with ThreadPoolExecutor(jobs) as pool:
        for tally in utils.progress(pool.map(run, batches), "batches", 0, len(batches)):
            tallies[tally.target].add(tally)
    results = list(tallies.values())
    return [*results, run_scripts(folder / "scripts", sound)] if "cli" in names else results


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def as_text(tallies: Sequence[Tally]) -> str:
    """The table, and how to see each finding again."""
    lines = [
        f"{'target':12}{'cases':>8}{'accepted':>10}{'refused':>9}{'findings':>10}{'cases/s':>9}"
    ]
    for t in tallies:
        lines.append(
            f"{t.target:12}{t.cases:>8}{t.accepted:>10}{t.refused:>9}{len(t.findings):>10}"
            f"{t.cases / max(t.seconds, 1e-9):>9.1f}"
        )
    for t in tallies:
        for finding, case in t.findings.items():
            again = f"python -m tests.stress.fuzz --target {t.target} --replay {case}"
            again = f"python {case}" if t.target == "scripts" else again
            lines += ["", f"{t.target}: {finding}", f"    {again}"]
    return "\n".join(lines)


def replay(name: str, file: Path, folder: Path) -> None:
    """Run one case again, with its whole traceback."""
    case = file.read_bytes()
    target = TARGETS[name](Sound(folder))
    os.chdir(folder)
    try:
        target.read(case, folder)
    except InputError as error:
        print(f"refused: {error}")
        return
    print("accepted")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, checked."""
    p = Parser("python -m tests.stress.fuzz", description="Fuzz the readers and command lines.")
    p.add_argument("--cases", type=int, default=10_000, help="in all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--target", default=",".join(TARGETS), help="some of them, by commas")
    p.add_argument("--jobs", type=int, default=2, help="processes at a time")
    p.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    p.add_argument("--findings", type=Path, default=Path("fuzz_findings"), help="folder of cases")
    p.add_argument("--replay", type=Path, default=None, metavar="FILE", help="a case of --findings")
    args = p.parse_args(argv)
    args.targets = args.target.split(",")
    if unknown := [t for t in args.targets if t not in TARGETS]:
        raise InputError(f"--target {unknown[0]}: choose from {', '.join(TARGETS)}")
    if args.cases < len(args.targets) or args.jobs < 1:
        raise InputError("--cases: one for each target at least; --jobs: 1 at least")
    return args


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        yield Path(folder).resolve()


def main(argv: Sequence[str] | None = None) -> None:
    """Fuzz, print, and exit with 1 where there are findings."""
    args = parse(argv)
    torch.set_num_threads(1)
    with _scratch() as folder:
        if args.replay:
            return replay(args.targets[0], args.replay.resolve(), folder)
        began = time.perf_counter()
        tallies = fuzz(args.targets, args.cases, args.seed, args.jobs, folder)
        for tally in tallies:
            _rescue(tally, args.findings)
    seconds = round(time.perf_counter() - began, 1)
    print(as_text(tallies))
    facts = {"cases": args.cases, "seed": args.seed, "jobs": args.jobs, "seconds": seconds}
    results = [asdict(t) | {"seconds": round(t.seconds, 1)} for t in tallies]
    utils.write_json({**facts, "targets": results, **utils.environment()}, args.json)
    if any(t.findings for t in tallies):
        sys.exit(1)
    return None


def _rescue(tally: Tally, folder: Path) -> None:
    """Copy the findings' cases out of the scratch folder."""
    for number, (finding, case) in enumerate(list(tally.findings.items()), 1):
        if os.path.isfile(case):
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / f"{tally.target}-{number}.bin"
            shutil.copy(case, kept)
            tally.findings[finding] = str(kept)


if __name__ == "__main__":
    utils.run_script(main)
