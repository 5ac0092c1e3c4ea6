"""Fuzz the readers: randomly damaged files must be read or raise InputError, and nothing else.

    python -m tests.stress.fuzz --seconds 60 [--seed N] [--target checkpoint,refs]

Damage is flipped, removed, repeated and swapped bytes in a sound file of each kind. Exits with 1 if
another exception is raised, if a file is made outside the working folder, or a case takes more than
ten seconds; the case is kept in fuzz_findings/.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features

import utils
from bert import load_config, load_tokenizer
from lib.checkpoint import read_checkpoint
from lib.errors import InputError
from refer import REFER
from refer.images import open_rgb
from refer.pickles import load_refs
from tests.refer_files import TINY_BERT, default_instances, default_refs, write_root

SECONDS = 10  # upper limit of a case


def _checkpoint() -> bytes:
    out = io.BytesIO()
    torch.save({"model": {"w": torch.arange(20.0)}, "args": {"lr": 0.1}, "epoch": 1}, out)
    return out.getvalue()


def _image(kind: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((24, 18), 60).convert("RGB").save(out, kind)
    return out.getvalue()


def _numpy_refs() -> bytes:
    refs: Any = default_refs()
    for ref in refs:
        ref |= {"ann_ids": np.array([ref["ann_id"]]), "split": np.str_(ref["split"])}
        ref |= {"ref_id": np.int64(ref["ref_id"]), "file_name": np.array(["x", 1], dtype=object)}
    return pickle.dumps(refs, 2)


def _read_instances(path: Path) -> None:
    root = write_root(path.parent / "root")
    os.replace(path, root / "refcoco" / "instances.json")
    refer = REFER(root)
    for ref in refer.loadRefs():
        refer.getMask(ref)


def _read_bert(path: Path) -> None:
    for name in ("vocab.txt", "tokenizer_config.json"):
        (path.parent / name).write_bytes((TINY_BERT / name).read_bytes())
    load_config(path.parent)
    load_tokenizer(path.parent)


# A kind of file: its name, a sound content, and its reader.
TARGETS: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], object]]] = {
    "checkpoint": ("x.pth", _checkpoint, read_checkpoint),
    "refs": ("refs(x).p", lambda: pickle.dumps(default_refs(), 2), load_refs),
    "numpy": ("refs(x).p", _numpy_refs, load_refs),
    "instances": ("x.json", lambda: json.dumps(default_instances()).encode(), _read_instances),
    "jpeg": ("x.jpg", lambda: _image("JPEG"), open_rgb),
    "png": ("x.png", lambda: _image("PNG"), open_rgb),
    "bert": ("config.json", lambda: (TINY_BERT / "config.json").read_bytes(), _read_bert),
}

# Formats that not every Pillow writes.
if features.check("jpg_2000"):
    TARGETS["jpeg2000"] = ("x.jp2", lambda: _image("JPEG2000"), open_rgb)
if features.check("avif"):
    TARGETS["avif"] = ("x.avif", lambda: _image("AVIF"), open_rgb)


def damage(data: bytes, rng: random.Random) -> bytes:
    """A copy with one to four changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 2, 8, 64)))
        match rng.randrange(5):
            case 0 if a < len(out):
                out[a] ^= 1 << rng.randrange(8)
            case 1 if a < len(out):
                out[a] = rng.choice((0, 1, 127, 128, 255))
            case 2:
                del out[a:b]
            case 3:
                out[a:a] = out[a:b] * rng.randint(1, 3)
            case 4:
                del out[max(1, a) :]
        if not out:
            return b""
    return bytes(out)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in code that takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, seconds: float, seed: int) -> tuple[Counter[str], dict[str, bytes]]:
    """Read damaged files for some seconds.

    Returns:
        Numbers of cases by outcome: 'read', 'InputError' and findings; and a case of each finding.
    """
    file, make, read = TARGETS[name]
    sound, rng = make(), random.Random(f"{name} {seed}")
    outcomes: Counter[str] = Counter()
    findings: dict[str, bytes] = {}
    end = time.monotonic() + seconds
    while not outcomes or time.monotonic() < end:
        case, outcome = damage(sound, rng), "read"
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            path = Path(folder) / file
            path.write_bytes(case)
            try:
                with time_limit(SECONDS):
                    read(path)
            except InputError as error:
                outcome = "InputError" if str(error).isprintable() else "unprintable message"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"[:120]
        outcomes[outcome] += 1
        if outcome not in ("read", "InputError"):
            findings.setdefault(outcome, case)
    return outcomes, findings


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, checked."""
    p = utils.Parser("python -m tests.stress.fuzz", description="Fuzz the readers of files.")
    p.add_argument("--seconds", type=float, default=60, help="in all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--target", default=",".join(TARGETS), help="some of them, by commas")
    args = p.parse_args(argv)
    args.targets = args.target.split(",")
    if unknown := [t for t in args.targets if t not in TARGETS]:
        raise InputError(f"--target {unknown[0]}: choose from {', '.join(TARGETS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Fuzz, print, and exit with 1 if there are findings."""
    args = parse(argv)
    torch.set_num_threads(1)
    result = False
    for name in args.targets:
        outcomes, findings = fuzz(name, args.seconds / len(args.targets), args.seed)
        print(f"{name}: {dict(outcomes)}")
        for number, (outcome, case) in enumerate(findings.items(), 1):
            result = True
            kept = Path("fuzz_findings") / f"{name}-{number}.bin"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(case)
            print(f"  {outcome}: {kept}")
    if result:
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main)
