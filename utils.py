"""What touches the machine: processes, seeds, logs. The only user of torch.distributed here."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lib.errors import InputError

log = logging.getLogger("lavt")
T = TypeVar("T")


@dataclass(frozen=True)
class DistInfo:
    """This process among all.

    Attributes:
        rank: number of this process, 0 .. world-1.
        local_rank: its number on this machine.
        world: number of processes.
        device: where its tensors live.
    """

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def init_distributed(device: str, local_rank: int | None = None) -> DistInfo:
    """Join the process group where a launcher started several processes.

    Args:
        device: 'cuda:0', 'cuda' or 'cpu'. With several processes each takes the GPU of its local
            rank. Without CUDA the CPU is used.
        local_rank: from an old launcher's ``--local_rank``; the environment wins.

    Returns:
        Facts about this process. Nothing else changes: no folders, no patched ``print``.

    Raises:
        InputError: the launcher started more processes than there are GPUs.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", local_rank if local_rank is not None else 0))
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
        if index >= torch.cuda.device_count():
            raise InputError(
                f"process {local} has no GPU: {torch.cuda.device_count()} here; "
                "start fewer with --nproc_per_node, or use --device cpu"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return DistInfo(rank, local, world, chosen)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; exact for integers. One process: as it is."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their float buffers (batch norm statistics).

    With SyncBatchNorm they agree already; on the CPU each process keeps its own until this.
    """
    if not dist.is_initialized():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def seed_everything(*parts: int) -> None:
    """Seed Python, numpy and torch from numbers that together name a moment (seed, epoch, rank)."""
    seed = int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
        to_file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(to_file)


class _TqdmHandler(logging.Handler):
    """Prints above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def progress(items: Iterable[T], desc: str, rank: int, total: int | None = None) -> Iterable[T]:
    """A progress bar on rank 0, where there is a terminal to show it on."""
    quiet = rank != 0 or not sys.stderr.isatty()
    return tqdm(items, desc=desc, total=total, disable=quiet, leave=False, dynamic_ncols=True)


def make_folder(path: Path) -> None:
    """Make a folder that will be written to, so that a long run cannot fail on it at its end.

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
    """Write a text file whole or not at all, in UTF-8.

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
    """Write a JSON file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    write_text(json.dumps(content, indent=1) + "\n", path)


def start_jsonl(path: Path, last_step: int) -> None:
    """Make a run's metrics file ready: a resumed run goes on, a fresh one starts a new file.

    Args:
        path: of the file, which may exist.
        last_step: the step that the run continues after, 0 for a fresh run. Lines of later steps,
            which will be written again, are dropped; a fresh run sets an older file aside.
    """
    if not path.is_file():
        return
    if last_step == 0:
        number = sum(1 for _ in path.parent.glob(f"{path.stem}.*{path.suffix}")) + 1
        path.rename(path.with_name(f"{path.stem}.{number}{path.suffix}"))
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a line cut off by a crash
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def append_jsonl(record: dict[str, Any], path: Path) -> None:
    """Add a line to a JSON-lines file; a non-finite number becomes null."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(clean) + "\n")


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far: allocated on a GPU, resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "tokenizers"),
    *("pycocotools", "numpy", "pillow", "scipy"),
)


def environment() -> dict[str, Any]:
    """Versions, commit, processes and time, for the record of a result."""
    return {
        "python": sys.version.split()[0],
        **{name: _version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with the build, which the package's record may leave out
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this code, with '-dirty' where tracked files were changed since."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def run_script(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script's ``main``; what the user can mend becomes one line and exit code 2."""
    rank = int(os.environ.get("RANK", 0))
    who = f"error (process {rank}): " if rank else "error: "
    code = 2
    try:
        main(None)
        code = 0
    except InputError as e:
        print(who + str(e), file=sys.stderr)
    except KeyboardInterrupt:
        print(who + "interrupted", file=sys.stderr)
        code = 130
    except torch.OutOfMemoryError:
        print(who + "the GPU's memory is full: lower --batch-size or --img_size", file=sys.stderr)
    except RuntimeError as e:
        if not (dist.is_initialized() and _lost_peer(e)):
            raise
        print(who + "another process died; see its message above", file=sys.stderr)
        code = 3
    finally:
        sys.stdout.flush()
        if code == 0 and dist.is_initialized():
            dist.destroy_process_group()
    if code:
        # Not sys.exit: a dying process must not wait for the others in a library's clean-up.
        sys.stderr.flush()
        os._exit(code) if dist.is_initialized() else sys.exit(code)


def _lost_peer(error: RuntimeError) -> bool:
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
    return any(sign in text for sign in signs)
