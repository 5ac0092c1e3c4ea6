"""Processes, seeds, logging, signals and atomic files. The only user of torch.distributed."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib.errors import InputError

log = logging.getLogger("lavt")
T = TypeVar("T")


@dataclass(frozen=True)
class DistInfo:
    """Facts about this process.

    Attributes:
        rank: of this process, 0 .. world-1.
        world: number of processes.
        device: of its tensors.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


REQUEUE = 75  # exit code of a run that was asked to stop and can be resumed: EX_TEMPFAIL
STOPS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # as far as the system has them
# Seconds after which a second Ctrl-C kills: an earlier one may be the launcher's copy of the first.
SECOND_SIGINT_AFTER = 2.0


class Stopped(Exception):
    """A signal asked this run to stop; once training has started, its state is saved first."""


class StopSignals:
    """Handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP, which come before a job or a session ends.

    Where SIGHUP was ignored at the start, as ``nohup`` sees to, it stays so.

    A signal raises :class:`Stopped`, except inside :meth:`deferred`, where it only sets ``name``.

    Attributes:
        name: of the signal that came, '' before.
    """

    def __init__(self) -> None:
        self.name = ""
        self._deferred = False
        self._came_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for name in STOPS:
            number = getattr(signal, name, None)
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, now = bool(self.name), time.monotonic()
        if not again:
            self.name, self._came_at = signal.Signals(number).name, now
        kill = again and number == signal.SIGINT and now - self._came_at > SECOND_SIGINT_AFTER
        if not self._deferred:
            raise Stopped(f"stopped by {self.name}")
        if kill:
            raise KeyboardInterrupt
        if not again and environment_number("RANK") == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{self.name}: stopping after this step\n".encode())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Do not interrupt this work: a signal only sets :attr:`name`."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of :meth:`deferred` work that a signal may interrupt at any moment.

        Raises:
            Stopped: a signal came, now or before.
        """
        self._deferred = False
        try:
            if self.name:
                raise Stopped(f"stopped by {self.name}")
            yield
        finally:
            self._deferred = True


# A gloo group for objects and flags on the CPU; gradients go through the default group.
_control: Any = None


def environment_number(name: str, default: int = 0) -> int:
    """A number that a launcher sets in the environment; ``default`` where it is not set or empty.

    Raises:
        InputError: it is no number.
    """
    from lib import launch

    return launch.number(name, default)


def init_distributed(
    device: str, local_rank: int | None = None, *, training: bool = False
) -> DistInfo:
    """Join the process group where a launcher started several processes.

    Args:
        device: 'cuda:0', 'cuda', 'cpu' or another one of torch's. Each of several processes uses
            the GPU of its local rank. Without CUDA the CPU is used.
        local_rank: from an old launcher's ``--local_rank``; the environment wins.
        training: only on the CPU or with CUDA.

    Raises:
        InputError: the device cannot be used, the launcher started more processes than there are
            GPUs, its variables are wrong, or the processes do not meet.
    """
    from lib import launch

    rank, world = launch.processes()
    local = environment_number("LOCAL_RANK", local_rank or 0)
    try:
        chosen = torch.device(device)
    except RuntimeError as e:
        raise InputError(f"--device {device}: give cpu, cuda or cuda:N") from e
    if chosen.type == "cuda" and not torch.cuda.is_available():
        if rank == 0:
            log.warning("no CUDA here: running on the CPU")
        chosen = torch.device("cpu")
    if chosen.type == "cuda":
        index = local if world > 1 else (chosen.index or 0)
        count = torch.cuda.device_count()
        if index >= count:
            raise InputError(
                f"process {local} has no GPU: this machine has {count}; "
                "start fewer with --nproc_per_node, or use --device cpu"
                if world > 1
                else f"--device {device}: this machine has {count} GPUs, numbered from 0"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    elif chosen.type != "cpu":
        try:
            (torch.ones(1, device=chosen) + 1).cpu()
        except Exception as e:  # each kind of device has errors of its own
            raise InputError(f"--device {device} does not work here: give cpu or cuda") from e
        if training or world > 1:
            what = "training" if training else "a run of several processes"
            raise InputError(f"--device {device}: {what} needs cpu or cuda")
    if world > 1:
        global _control
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # A launcher may keep its store over a restart (torch 2.15), and with it the addresses
        # of the processes that have ended. Several machines may count restarts differently.
        alone = environment_number("LOCAL_WORLD_SIZE") == world
        prefix, wait = f"restart_{restarts() if alone else 0}", default_pg_timeout

        def connect() -> dist.Store:
            store = next(rendezvous("env://", rank, world, timeout=wait))[0]
            store = dist.PrefixStore(prefix, store)
            store.set(f"here_{rank}", "")
            store.wait([f"here_{r}" for r in range(world)], wait)
            return store

        store = launch.meet(connect, wait)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        _control = dist.new_group(backend="gloo")
    return DistInfo(rank, world, chosen)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; exact for integers."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_true(x: Tensor) -> Tensor:
    """Whether a scalar bool is true on every rank; does not wait for the GPU."""
    if not dist.is_initialized():
        return x
    count = x.to(torch.int32)
    dist.all_reduce(count, dist.ReduceOp.MIN)
    return count.bool()


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any rank; all ranks must call this together."""
    if not dist.is_initialized():
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=_control)
    return votes.bool().tolist()


def wrap_ddp(module: nn.Module, info: DistInfo) -> nn.Module:
    """Wrap a module in DDP, with synchronised batch norm on GPUs; one process: as it is."""
    if info.world == 1:
        return module
    # Batch norm statistics agree through SyncBatchNorm or are averaged before they are used, so
    # DDP does not broadcast buffers at each step. Newer torch has another name for that.
    named = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    options: dict[str, Any] = {sync: False}
    if info.device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        options["device_ids"] = [info.device.index]
    return DistributedDataParallel(module, **options)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather(mine: T) -> list[T]:
    """Collect a picklable object of every rank on rank 0.

    Returns:
        The objects in the order of ranks on rank 0; on other ranks their own alone.
    """
    if not dist.is_initialized():
        return [mine]
    main = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * dist.get_world_size() if main else None
    dist.gather_object(mine, everyone, dst=0, group=_control)
    return everyone if everyone is not None else [mine]


def from_main(value: T) -> T:
    """The value of rank 0, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def restarts() -> int:
    """How often torchrun has restarted these processes after one of them died."""
    # Without a launcher the number is left over from another run.
    return environment_number("TORCHELASTIC_RESTART_COUNT") if os.environ.get("WORLD_SIZE") else 0


def average_buffers(model: nn.Module) -> None:
    """Average float buffers (batch norm statistics) over all ranks.

    With SyncBatchNorm they agree already; on a CPU each rank has its own until this call.
    """
    if not dist.is_initialized():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def seed_everything(*parts: int) -> None:
    """Seed Python, numpy and torch from several numbers, such as (seed, epoch, rank)."""
    seed = int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> list[Tensor]:
    """States of torch's random generators: the CPU's and, on a GPU, the GPU's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_rng_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def make_deterministic() -> None:
    """Make torch compute the same bits in every run; slower on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at CUDA's first use
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def setup_logging(folder: Path | None, rank: int) -> None:
    """Log to the terminal and, where ``folder`` is given, to ``folder/log.txt``; rank 0 only.

    Other processes still show warnings.
    """
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.addHandler(_TqdmHandler())
    if folder is not None and rank == 0:
        make_folder(folder)
        to_file = _LogFile(folder / "log.txt", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(to_file)


class _LogFile(logging.FileHandler):
    """A log file; a full disk cuts it short but does not stop the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore the error: the line was printed to the terminal."""


class _TqdmHandler(logging.Handler):
    """Prints above a progress bar; training goes on where nobody reads it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, None
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def progress(items: Iterable[T], desc: str, rank: int, total: int | None = None) -> Iterable[T]:
    """A progress bar on rank 0, if stderr is a terminal."""
    seen = bool(sys.stderr) and not sys.stderr.closed and sys.stderr.isatty()
    quiet = rank != 0 or not seen
    return tqdm(items, desc=desc, total=total, disable=quiet, leave=False, dynamic_ncols=True)


def make_folder(path: Path) -> None:
    """Make a folder that will be written to, so that a run fails at its start and not at its end.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the folder {path}: {e.strerror}") from e
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write to the folder {path}: choose another or change its rights")


def write_text(content: str, path: str | os.PathLike[str]) -> None:
    """Write a text file atomically, in UTF-8.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        make_folder(path.parent)
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from e


def write_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a JSON file atomically.

    Raises:
        InputError: it cannot be written.
    """
    write_text(json.dumps(content, indent=1) + "\n", path)


def trim_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop records of a JSON-lines file, and lines that a crash cut off.

    Args:
        path: of the file, which need not exist.
        keep: whether a record stays.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if keep(json.loads(line)):
                kept.append(line + "\n")
    write_text("".join(kept), path)


def append_jsonl(record: dict[str, Any], path: Path) -> None:
    """Append a record to a JSON-lines file; non-finite numbers become null.

    Raises:
        InputError: it cannot be written.
    """
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(clean) + "\n")
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}; free some space") from e


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory: allocated on a GPU, resident in this process on a CPU; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def environment() -> dict[str, Any]:
    """Versions, commit, processes and time, for result files."""
    from lib import facts

    return {
        "python": sys.version.split()[0],
        **{name: facts.version(name) for name in facts.PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "git_commit": facts.git_commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are :class:`InputError`.

    Flags are defined with underscores; a hyphen in a flag's name is read as an underscore.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, after replacing hyphens in flags' names."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in words], namespace)

    def error(self, message: str) -> Any:
        """Raise instead of exiting."""
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


def _underscored(word: str) -> str:
    """``--batch-size=8`` becomes ``--batch_size=8``; other words stay as they are."""
    if not re.match(r"--[A-Za-z][\w-]*(=|$)", word):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def run_script(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script's ``main``; an error that the user can fix becomes one line and exit code 2.

    Output that nobody reads, or that the terminal cannot show, is no error.
    """
    from lib import terminal

    terminal.protect()
    rank, code, words = 0, 2, ""
    try:
        rank = environment_number("RANK")
        main(None)
        code = 0
    except InputError as e:
        words = terminal.lost_process(e, several=False) or str(e)  # if it came while saving
    except Stopped as e:
        words, code = f"{e}; exit code {REQUEUE}", REQUEUE
    except KeyboardInterrupt:
        words, code = "interrupted", 130
    except torch.OutOfMemoryError:
        words = "the GPU's memory is full: lower --batch_size or --img_size"
    except (RuntimeError, OSError, EOFError) as e:
        words, code = terminal.lost_process(e, dist.is_initialized()), 3
        if not words:
            raise
    finally:
        sys.stdout.flush()
        if code == 0 and dist.is_initialized():
            dist.destroy_process_group()
    if not code:
        return
    if code != REQUEUE:
        print(f"error (process {rank}): {words}" if rank else f"error: {words}", file=sys.stderr)
    elif not rank:
        print(words, file=sys.stderr)
    # Not sys.exit: a dying process must not wait for the others in a library's clean-up.
    sys.stderr.flush()
    os._exit(code) if dist.is_initialized() else sys.exit(code)
