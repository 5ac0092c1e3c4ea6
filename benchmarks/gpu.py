"""How fast a GPU trains, evaluates and learns, in a few minutes and without a network.

    python -m benchmarks.gpu                     # or: make bench-gpu
    python -m benchmarks.gpu --dry-run           # every line at micro size, on the CPU
    python -m benchmarks.gpu --report benchmarks/results/gpu_*.json     # the tables again

Training steps of the published network in float32 and with each flag of ``--fast``, evaluation,
the loader's workers, and how far a network gets on RefShapes in the minutes that are left. What
the time does not suffice for is skipped, and named. Writes a JSON file after each part, and puts
its tables into docs/speed.md. FLOPs are those of the network as published, without recomputed
blocks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

import utils
from args import Parser
from benchmarks import evaluation, scale, speed
from benchmarks.pages import markdown, put_between
from lib.errors import InputError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speed.md"
MARKS = ("<!-- table: make bench-gpu -->", "<!-- end of make bench-gpu -->")
WAYS: dict[str, dict[str, Any]] = {  # fields of speed.Case, and TF32
    "float32": {},
    "TF32": {"tf32": True},
    "bf16": {"tf32": True, "amp": "bf16"},
    "bf16, channels_last": {"tf32": True, "amp": "bf16", "channels_last": True},
    "the same, grad_checkpoint": {
        **{"tf32": True, "amp": "bf16", "channels_last": True},
        "grad_checkpoint": True,
    },
    "the same, compiled": {"tf32": True, "amp": "bf16", "channels_last": True, "compile": True},
}
# Dense TFLOP/s of data sheets, of these kinds; of the first name that is part of the GPU's.
KINDS = ("float32", "TF32", "bf16")
PEAKS = {
    "H200": (67.0, 494.5, 989.0),
    "H100 PCIe": (51.0, 378.0, 756.0),
    "H100": (67.0, 494.5, 989.0),
    "A100": (19.5, 156.0, 312.0),
    "L40S": (91.6, 183.0, 362.0),
    "RTX 4090": (82.6, 82.6, 165.2),
}


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        swin, window, side: of the network that is timed.
        batches: of its training steps.
        seconds: that each row is timed for.
        expressions, eval_batch: of the evaluation.
        workers: numbers of loader processes.
        loaded: batches that the loader makes in a round.
        level, scenes, val_scenes: of RefShapes.
        bert: of the network that is timed; {} is bert-base-uncased.
        learner: flags of train.py for RefShapes.
        compiling, learning: seconds that are kept free for compiling a network, and for learning.
    """

    swin: str
    window: int
    side: int
    batches: tuple[int, ...]
    seconds: float
    expressions: int
    eval_batch: int
    workers: tuple[int, ...]
    loaded: int
    level: str
    scenes: int
    val_scenes: int
    bert: dict[str, Any]
    learner: tuple[str, ...]
    compiling: float
    learning: float


LEARNER = (
    *("--model", "lavt_one", "--text_from_scratch", "--lang_layers", "all", "--loss", "dice"),
    *("--fast", "--no_compile", "--print_freq", "20"),
)
FULL = Sizes(
    swin="base",
    window=12,
    side=480,
    batches=(8, 16, 32),
    seconds=1.5,
    expressions=256,
    eval_batch=16,
    workers=(1, 4),
    loaded=30,
    level="hard",
    scenes=3000,
    val_scenes=150,
    bert={},
    learner=(
        *(*LEARNER, "--swin_type", "tiny", "--img_size", "224", "--ape", "56"),
        *("--drop_path", "0.1", "--lr", "5e-4", "--batch_size", "64", "--workers", "8"),
        *("--epochs", "6"),
    ),
    compiling=80.0,
    learning=70.0,
)
DRY = Sizes(
    swin="micro",
    window=7,
    side=56,
    batches=(2,),
    seconds=0.0,
    expressions=4,
    eval_batch=2,
    workers=(1,),
    loaded=2,
    level="easy",
    scenes=8,
    val_scenes=2,
    bert={"num_hidden_layers": 1, "hidden_size": 24},
    learner=(
        *(*LEARNER, "--swin_type", "micro", "--img_size", "56", "--ape", "14", "--device", "cpu"),
        *("--batch_size", "4", "--workers", "0", "--epochs", "2"),
    ),
    compiling=0.0,
    learning=1.0,
)


class Budget:
    """The time that is left.

    Attributes:
        skipped: what it did not suffice for.
    """

    def __init__(self, minutes: float) -> None:
        self.began = time.monotonic()
        self.seconds = 60 * minutes
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def allows(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; notes what is skipped if not."""
        if self.left >= seconds:
            return True
        self.skipped.append(what)
        print(f"skipped, the time is up: {what}", file=sys.stderr, flush=True)
        return False


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    p = Parser(prog="benchmarks.gpu", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--minutes", type=float, default=5.5, help="that all of it may take")
    p.add_argument("--dry_run", action="store_true", help="micro size, on the CPU, no page")
    p.add_argument("--output", help="JSON file, by default results/gpu_<name>.json")
    p.add_argument("--report", nargs="+", metavar="JSON", help="only put their tables in the page")
    args = p.parse_args(argv)
    if not args.minutes > 0:
        raise InputError(f"--minutes {args.minutes}: must be above 0")
    return args


# ---- training steps ----


def cases(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, bool, speed.Case]]:
    """(way, TF32, row); the slow ones, which compile, come last."""
    for way, options in sorted(WAYS.items(), key=lambda entry: "compile" in entry[1]):
        options = dict(options)
        tf32 = options.pop("tf32", False)
        for batch in sizes.batches:
            case = speed.Case(
                *("lavt", sizes.swin, sizes.window, sizes.side, batch, "off", "step"),
                compile=False,
                plain=True,
                profile=False,
                device=str(device),
                threads=torch.get_num_threads(),
                repeats=1,
            )
            yield way, tf32, replace(case, **options)


def set_tf32(on: bool) -> None:
    """Allow TF32, or forbid it; PyTorch's own default allows it to convolutions alone."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def time_steps(case: speed.Case, seconds: float) -> dict[str, Any]:
    """Seconds and memory of a training step; steps run on without waiting for one another."""
    device = torch.device(case.device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    run = speed.runner(case, speed.build(case, device), device)
    for _ in range(2):  # the first makes the optimizer's state, and compiles
        run()
    started = time.monotonic() - began
    one = speed.seconds(run, device)
    repeats = max(2, min(50, int(seconds / 2 / one)))

    def several() -> None:
        for _ in range(repeats):
            run()

    step = min(speed.seconds(several, device) for _ in range(2)) / repeats
    return {
        "seconds": step,
        "images_per_second": case.batch / step,
        "peak_memory_gb": utils.peak_memory_gb(device),
        "start_seconds": started,
    }


def matmul_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s that this machine reaches in large products, by kind."""
    rates = {}
    for name, dtype in zip(KINDS, (torch.float32, torch.float32, torch.bfloat16), strict=True):
        set_tf32(name != "float32")
        ways = speed.matmuls(dtype, device, None if device.type == "cuda" else 64)
        for multiply, _ in ways.values():
            multiply()
        rates[name] = max(
            work / speed.seconds(multiply, device)
            for multiply, work in ways.values()
            for _ in range(3)
        )
    return rates


def peaks_of(name: str) -> tuple[float, ...] | None:
    """The data sheet's numbers for a GPU, None for one that is not known."""
    return next((peaks for part, peaks in PEAKS.items() if part in name), None)


def train_rows(sizes: Sizes, device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """A row for each way and batch that the time and the memory suffice for."""
    rates = matmul_rates(device)
    peaks = peaks_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    flop, took = 0, {False: 10.0, True: sizes.compiling}
    for way, tf32, case in cases(sizes, device):
        what = f"training, {way}, batch {case.batch}"
        if not budget.allows(what, took[case.compile] + sizes.learning + 30 * (sizes is FULL)):
            continue
        began = time.monotonic()
        set_tf32(tf32)
        flop = flop or speed.flops(replace(case, compile=False, batch=1))[0]
        row: dict[str, Any] = {"way": way, "batch": case.batch, "gflop": case.batch * flop / 1e9}
        kind = "bf16" if case.amp == "bf16" else "TF32" if tf32 else "float32"
        try:
            row |= time_steps(case, sizes.seconds)
            rate = case.batch * flop / row["seconds"]
            row["share_of_matmul"] = rate / rates[kind]
            if peaks:
                row["mfu"] = rate / 1e12 / peaks[KINDS.index(kind)]
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as e:  # a row that fails must not take the others with it
            row["error"] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200]
        took[case.compile] = time.monotonic() - began
        done = row.get("error") or f"{row['images_per_second']:.1f} images/s"
        print(f"{what}: {done}", file=sys.stderr, flush=True)
        yield row


# ---- evaluation, loader, learning ----


def evaluate(sizes: Sizes, data: Path, device: torch.device) -> dict[str, Any]:
    """Expressions a second, of the forward passes alone and of a whole evaluation."""
    set_tf32(False)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "evaluation.json"
        evaluation.main(
            [
                *("--refer_data_root", str(data), "--ck_bert", str(data / "bert")),
                *("--swin_type", sizes.swin, "--window", str(sizes.window)),
                *("--img_size", str(sizes.side), "--batch_size", str(sizes.eval_batch)),
                *("--expressions", str(sizes.expressions), "--rounds", "1"),
                *("--workers", str(max(sizes.workers)), "--device", str(device)),
                *("--output", str(output)),
            ]
        )
        result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result


def generate(sizes: Sizes, folder: Path) -> subprocess.Popen[bytes]:
    """Begin to write RefShapes, on the CPU, while the GPU is timed."""
    command = [sys.executable, "-m", "data.refshapes", "--out", str(folder / "data")]
    command += ["--level", sizes.level, "--scenes", str(sizes.scenes)]
    command += ["--val-scenes", str(sizes.val_scenes), "--test-scenes", "2", "--jobs"]
    return subprocess.Popen(
        [*command, str(max(1, (os.cpu_count() or 2) - 2))], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def learn(sizes: Sizes, data: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Train on RefShapes for so many seconds; mIoU after each epoch that they suffice for."""
    gc.collect()
    torch.cuda.empty_cache()
    bert = str(data / "bert")
    options = [*sizes.learner, "--model_id", "learner", "--refer_data_root", str(data)]
    command = [sys.executable, str(ROOT / "train.py"), *options, "--ck_bert", bert]
    with (folder / "learner.txt").open("wb") as output:
        job = subprocess.Popen(
            [*command, "--bert_tokenizer", bert], cwd=folder, stdout=output, stderr=output
        )
        try:
            job.wait(seconds)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGTERM)
            try:
                job.wait(20)
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()
    metrics = folder / "models/learner/metrics.jsonl"
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    records = [json.loads(line) for line in text.splitlines()]
    spent, curve = 0.0, []
    for record in (r for r in records if r["kind"] == "epoch"):
        spent += record["seconds"]
        curve.append({"seconds": spent, "mIoU": record["val"]["mIoU"], "loss": record["loss"]})
    last_words = (folder / "learner.txt").read_text(errors="replace").splitlines()[-3:]
    return {"curve": curve, "flags": options[:-2], "last_words": last_words}


# ---- tables ----


def tables(record: dict[str, Any]) -> str:
    """A result file as Markdown."""
    environment = record["environment"]
    name = environment["gpu"] or record["machine"]["cpu"]
    parts = [
        f"{name}; PyTorch {environment['torch']}; {record['seconds'] / 60:.1f} minutes.",
        train_table(record),
    ]
    if "evaluation" in record:
        parts.append(evaluation.table(record["evaluation"]))
    if "loader" in record:
        parts.append(scale.loader_table(record["loader"]))
    if record.get("learning", {}).get("curve"):
        rows = [
            [f"{point['seconds']:.0f}", f"{point['mIoU']:.1f}", f"{point['loss']:.3f}"]
            for point in record["learning"]["curve"]
        ]
        parts += [
            f"RefShapes {record['level']}, `{' '.join(record['learning']['flags'])}`:",
            markdown(["seconds of training", "mIoU", "training loss"], rows),
        ]
    if record["skipped"]:
        parts.append(f"Not measured, the time was up: {'; '.join(record['skipped'])}.")
    return "\n\n".join(parts)


def train_table(record: dict[str, Any]) -> str:
    """A line for each way to train and batch."""
    head = ["training step", "batch", "images/s", "seconds", "MFU", "share of best matmul"]
    rows = []
    for row in record["rows"]:
        if "error" in row:
            rows.append([row["way"], str(row["batch"]), row["error"], "", "", "", "", ""])
            continue
        mfu = f"{row['mfu']:.0%}" if "mfu" in row else ""
        rows.append(
            [
                *(row["way"], str(row["batch"]), f"{row['images_per_second']:.1f}"),
                *(f"{row['seconds']:.3f}", mfu, f"{row['share_of_matmul']:.0%}"),
                *(f"{row['peak_memory_gb']:.2f} GB", f"{row['start_seconds']:.0f} s"),
            ]
        )
    network = f"lavt {record['sizes']['swin']}, window {record['sizes']['window']}, "
    network += f"{record['sizes']['side']} px, {record['gflop_per_image']:.0f} GFLOP an image:"
    return f"{network}\n\n{markdown([*head, 'peak memory', 'start'], rows)}"


# ---- the script ----


def measure(
    sizes: Sizes, device: torch.device, budget: Budget, folder: Path, save: Callable[[Any], None]
) -> dict[str, Any]:
    """All parts, in the order of their importance; ``save`` is called after each."""
    record: dict[str, Any] = {"rows": [], "skipped": budget.skipped, "level": sizes.level}
    record |= {"machine": speed.machine(), "environment": utils.environment()}
    record |= {"sizes": {k: v for k, v in vars(sizes).items() if k != "bert"}, "seconds": 0.0}
    data = folder / "data"

    def done() -> None:
        record["seconds"] = budget.seconds - budget.left
        record["gflop_per_image"] = next((r["gflop"] / r["batch"] for r in record["rows"]), 0.0)
        save(record)

    writing = generate(sizes, folder)
    try:
        for row in train_rows(sizes, device, budget):
            record["rows"].append(row)
            done()
        writing.wait(max(1.0, budget.left))
    except subprocess.TimeoutExpired:
        budget.allows("all that needs RefShapes, which was not written in time", float("inf"))
        done()
        return record
    finally:
        writing.kill()
    if writing.returncode:
        raise InputError("RefShapes could not be written; see above")
    if budget.allows("evaluation", sizes.learning / 2):
        record["evaluation"] = evaluate(sizes, data, device)
        done()
    if budget.allows("loader", sizes.learning / 2):
        loaded = (data, sizes.side, sizes.batches[0], sizes.workers, sizes.loaded)
        record["loader"] = scale.loader_rates(*loaded)
        done()
    if budget.allows("learning RefShapes", sizes.learning / 2):
        limit = min(budget.left - 10, 5 * sizes.learning) if sizes is FULL else 120.0
        record["learning"] = learn(sizes, data, folder, limit)
    done()
    return record


def rehearsed(record: dict[str, Any]) -> None:
    """Insist that every part was run.

    Raises:
        InputError: one failed or was skipped.
    """
    failed = [f"{row['way']}: {row['error']}" for row in record["rows"] if "error" in row]
    failed += record["skipped"]
    learning = record.get("learning", {})
    if len(learning.get("curve", ())) < 2:
        failed.append(f"learning: {' '.join(learning.get('last_words', ()))}")
    if failed:
        raise InputError(f"the rehearsal failed: {'; '.join(failed)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file, fill in the page."""
    args = parse(argv)
    if args.report:
        texts = [Path(path).read_text(encoding="utf-8") for path in args.report]
        put_between(PAGE, MARKS, "\n" + "\n\n".join(tables(json.loads(t)) for t in texts) + "\n")
        return
    if not args.dry_run and not torch.cuda.is_available():
        raise InputError("no CUDA here: --dry-run rehearses it on the CPU")
    sizes = DRY if args.dry_run else FULL
    device = torch.device("cpu" if args.dry_run else "cuda:0")
    budget = Budget(60 if args.dry_run else args.minutes)  # a rehearsal skips nothing
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = "dry_run" if args.dry_run else speed.slug(torch.cuda.get_device_name(device))
        results = folder if args.dry_run else speed.RESULTS
        path = Path(args.output or results / f"gpu_{name}.json")
        speed.BERT = sizes.bert
        if args.dry_run:  # trace what is compiled, without C++, which would take minutes
            compiled = partialmethod(nn.Module.compile, backend="aot_eager")
            nn.Module.compile = compiled  # type: ignore[assignment, method-assign]
        record = measure(sizes, device, budget, folder, lambda r: utils.write_json(r, path))
    print(tables(record))
    if args.dry_run:
        rehearsed(record)
        return
    put_between(PAGE, MARKS, f"\n{tables(record)}\n")
    print(f"\nwritten: {path}, {PAGE}")


if __name__ == "__main__":
    utils.run_script(main)
