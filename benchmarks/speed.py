"""How fast the models are, and how near that is to what this machine can do.

    python -m benchmarks.speed
    python -m benchmarks.speed --models lavt:base:12:480 --amp off,bf16 --train --profile
    python -m benchmarks.speed --report benchmarks/results/speed_*.json   # the tables again

Measures the rate at which this machine multiplies large matrices, then forward passes and training
steps, turn by turn, so that a busy neighbour slows both; of one CPU thread only its own time is
counted.
Prints tables (Markdown) and writes a JSON file. FLOPs are those of the network as published (2 per
multiply-add, BERT included), as PyTorch counts them. Each row has a process of its own, because of
its peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

import utils
from args import Parser
from benchmarks.pages import markdown
from data import loaders
from lib import cpu, runtime
from lib.errors import InputError
from lib.losses import LOSSES
from lib.model import Objective, Segmenter
from lib.segmentation import MODELS, build_model
from lib.swin import SWIN_SIZES
from lib.training import optim
from lib.training.steps import StepOptions, train_steps

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
BERT: dict[str, Any] = {}  # other than bert-base-uncased
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "step")
# Profile: parts of the network, each by a pattern of module names.
PARTS = {
    "Swin blocks: attention": r"blocks\.\d+",  # what is left of a block after its MLP
    "Swin blocks: MLP": r"blocks\.\d+\.mlp",
    "fusion (PWAM)": r"(fusion|attn[12])",
    "language gates": r"(res_gate|linear[12])",
    "patch embedding": "patch_embed",
    "patch merging": "downsample",
    "decoder": "classifier",
    "text encoder": r"(text_encoder|lang_stage\d)",
}
MLP_OF = "Swin blocks: attention", "Swin blocks: MLP"


@dataclass(frozen=True)
class Case:
    """One row: a model, and how it is run."""

    model: str
    swin: str
    window: int
    side: int
    batch: int
    amp: str
    mode: str
    compile: bool
    plain: bool
    profile: bool
    device: str
    threads: int
    repeats: int
    channels_last: bool = False
    grad_checkpoint: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        form = "compiled" if self.compile else "plain" if self.plain else ""
        return " ".join(filter(None, [self.model, self.swin, form]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(prog="benchmarks.speed", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--models",
        default="lavt:base:12:480,lavt:tiny:7:480",
        help="comma-separated name:swin:window:side",
    )
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--amp", default="off,bf16", help=f"comma-separated, of {', '.join(DTYPES)}")
    p.add_argument("--train", action="store_true", help="training steps, too")
    p.add_argument("--profile", action="store_true", help="seconds of each part of a forward pass")
    p.add_argument("--plain", action="store_true", help="rows without lib.cpu, too")
    p.add_argument("--compile", action="store_true", help="rows of torch.compile, too")
    p.add_argument("--quick", action="store_true", help="3 repeats instead of 10")
    p.add_argument("--device", default="cuda:0", help="the CPU where there is no CUDA")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--output", help="JSON file, by default results/speed_<machine>.json")
    p.add_argument("--report", nargs="+", metavar="JSON", help="print the tables of such files")
    return p.parse_args(argv)


def cases(args: argparse.Namespace) -> list[Case]:
    """The rows that the options ask for.

    Raises:
        InputError: unknown model, size or precision.
    """
    device = args.device if torch.cuda.is_available() else "cpu"
    forms = [(False, False)] + [(True, False)] * args.compile + [(False, True)] * args.plain
    amps, rows = args.amp.split(","), []
    if not set(amps) <= set(DTYPES):
        raise InputError(f"--amp {args.amp}: choose of {', '.join(DTYPES)}")
    for text in args.models.split(","):
        match = re.fullmatch(r"(\w+):(\w+):(\d+):(\d+)", text)
        if not match or match[1] not in MODELS or match[2] not in SWIN_SIZES:
            raise InputError(f"--models {text}: give name:swin:window:side, as lavt:base:12:480")
        for mode, amp, (compiled, plain) in itertools.product(MODES[: 1 + args.train], amps, forms):
            rows.append(
                Case(
                    *(match[1], match[2], int(match[3]), int(match[4]), args.batch, amp, mode),
                    compile=compiled,
                    plain=plain,
                    profile=args.profile and mode == "forward" and not compiled,
                    device=device,
                    threads=args.threads,
                    repeats=3 if args.quick else 10,
                )
            )
    return rows


# ---- the machine ----


def matmuls(
    dtype: torch.dtype, device: torch.device, n: int | None = None
) -> dict[str, tuple[Callable[[], Any], int]]:
    """PyTorch's ways to multiply matrices of ``n`` rows (large), each with the FLOPs of a call."""
    n = n or (8192 if device.type == "cuda" else 2048)
    channels = min(n, 512)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    linear = torch.nn.Linear(n, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    if cpu.pays():
        cpu.accelerate(linear)
    maps = torch.randn(1, channels, 64, 64, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    maps, weight = (t.to(memory_format=torch.channels_last) for t in (maps, weight))
    return {
        "torch.mm": (lambda: torch.mm(a, b), 2 * n**3),
        "linear": (partial(linear, a), 2 * n**3),
        "conv2d": (lambda: F.conv2d(maps, weight, padding=1), 2 * 9 * channels**2 * 64 * 64),
    }


def clock(device: torch.device) -> float:
    """Seconds, on a GPU after its work; of one thread its own, which neighbours do not lengthen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, by :func:`clock`."""
    began = clock(device)
    run()
    return clock(device) - began


def machine() -> dict[str, Any]:
    """What this machine is."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(text.split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": name[1].strip() if name else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "instructions": [f for f in known if f in flags],
    }


def slug(name: str) -> str:
    """A machine's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


# ---- a row, in its own process ----


def build(case: Case, device: torch.device) -> Segmenter:
    """The model with random weights."""
    torch.manual_seed(0)
    config = BertConfig(**BERT)
    with torch.device(device):
        model = build_model(
            case.model,
            swin_type=case.swin,
            window_size=case.window,
            text_config=config,
            accelerate=False,
        )
    if case.channels_last:
        runtime.use_channels_last(model)
    if case.grad_checkpoint:
        runtime.recompute_blocks(model)
    return model if case.plain else cpu.accelerate(model)  # also where it does not pay


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """A batch as the loader gives it: sentences that fill their length."""
    shape = (case.batch, 3, case.side, case.side)
    words = (case.batch, MODELS[case.model].max_tokens)
    return {
        "image": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "input_ids": torch.randint(1000, 2000, words, device=device),
        "attention_mask": torch.ones(words, dtype=torch.long, device=device),
        "target": torch.randint(2, (case.batch, case.side, case.side), device=device),
        "index": torch.arange(case.batch, device=device),
    }


def flops(case: Case) -> tuple[int, dict[str, int]]:
    """FLOPs of a run, and of each of its modules."""
    device = torch.device(case.device)
    model = build(case, device).train(case.mode == "step")
    batch = loaders.prepare_batch(inputs(replace(case, batch=1), device), device)
    if case.mode == "step":
        optim.freeze_unused(model, optim.parameter_groups(model, 1e-2, 10))
    # Plain attention is made of matmuls, which every PyTorch counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        if case.mode == "step":
            logits.sum().backward()
    counts = counter.get_flop_counts().items()
    parts = {name: case.batch * sum(by_op.values()) for name, by_op in counts}
    return case.batch * counter.get_total_flops(), parts


def runner(case: Case, model: Segmenter, device: torch.device) -> Callable[[], Any]:
    """A function that does the case's work once."""
    batch = inputs(case, device)
    if case.mode == "step":
        groups = optim.parameter_groups(model, 1e-2, 10)
        optim.freeze_unused(model, groups)
        optimizer = optim.build_optimizer(groups, 5e-5)
        objective: nn.Module = Objective(model, LOSSES["ce"])
        if case.compile:
            runtime.compile_module(objective)
        steps = train_steps(
            objective,
            itertools.repeat(batch),
            optimizer,
            optim.poly_schedule(optimizer, 10**6),
            device,
            StepOptions(case.amp),
        )
        return partial(next, steps)
    model.eval()
    if case.compile:
        runtime.compile_module(model)

    def forward() -> Tensor:
        moved = loaders.prepare_batch(batch, device)
        with torch.inference_mode(), runtime.autocast(device, case.amp):
            return model(moved["image"], moved["input_ids"], moved["attention_mask"])

    return forward


def measure(case: Case, total: int, by_module: dict[str, int]) -> dict[str, Any]:
    """The row of a case, from its FLOPs."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    model = build(case, device)
    run = runner(case, model, device)
    for _ in range(2):  # a training step makes the optimizer's state
        run()
    memory = utils.peak_memory_gb(device)
    ways = matmuls(DTYPES[case.amp], device)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    times: list[float] = []
    for _ in range(case.repeats):
        for way, (multiply, work) in ways.items():
            rates[way].append(max(work / seconds(multiply, device) for _ in range(3)))
        times.append(seconds(run, device))
    profile = profiled(model, run, device, by_module, case.repeats) if case.profile else None
    best = {way: max(found) for way, found in rates.items()}
    rate = max(best.values())
    return {
        **vars(case),
        "name": case.name,
        "seconds": min(times),
        "median_seconds": statistics.median(times),
        "gflop": total / 1e9,
        "matmul_gflops": {way: found / 1e9 for way, found in best.items()},
        "share": total / min(times) / rate,
        "share_of_mm": total / min(times) / best["torch.mm"],
        "peak_memory_gb": memory,
        "profile": profile,
    }


class Stopwatch:
    """Seconds spent in each part of a network, by hooks on its outermost modules."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.modules = dict.fromkeys(PARTS, "")
        self.began: list[float] = []
        self.handles = []
        self.names: dict[str, list[str]] = {part: [] for part in PARTS}
        for name, module in model.named_modules():
            for part, pattern in PARTS.items():
                if re.fullmatch(rf"(.*\.)?{pattern}", name) and not self._inside(name, part):
                    self.names[part].append(name)
                    self.handles.append(module.register_forward_pre_hook(self._start))
                    self.handles.append(module.register_forward_hook(partial(self._stop, part)))

    def _inside(self, name: str, part: str) -> bool:
        """Whether the module lies in one that is timed already, an MLP's block aside."""
        timed = [n for p, names in self.names.items() for n in names if (p, part) != MLP_OF]
        return any(name.startswith(n + ".") for n in timed)

    def _start(self, *_: object) -> None:
        self.began.append(clock(self.device))

    def _stop(self, part: str, *_: object) -> None:
        self.seconds[part] += clock(self.device) - self.began.pop()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


def profiled(
    model: nn.Module,
    run: Callable[[], Any],
    device: torch.device,
    by_module: dict[str, int],
    repeats: int,
) -> list[dict[str, Any]]:
    """Seconds and FLOPs of each part of a forward pass; the fastest of some passes."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        watch = Stopwatch(model, device)
        whole = seconds(run, device)
        watch.remove()
        if not best or whole < best["whole"]:
            best = {**watch.seconds, "whole": whole}
    root = type(model).__name__
    work = {p: sum(by_module.get(f"{root}.{n}", 0) for n in watch.names[p]) for p in PARTS}
    blocks, mlp = MLP_OF
    best[blocks] -= best[mlp]
    work[blocks] -= work[mlp]
    best["other"] = best["whole"] - sum(best[part] for part in PARTS)
    work["other"] = by_module[root] - sum(work.values())
    return [
        {"part": part, "seconds": best[part], "gflop": work[part] / 1e9}
        for part in (*PARTS, "other")
        if best[part] > 1e-5
    ]


# ---- tables ----


def summary(record: dict[str, Any]) -> str:
    """The tables of a result file, as Markdown."""
    rows = record["rows"]
    host = record["machine"]
    threads = rows[0]["threads"]
    where = record["environment"]["gpu"] if rows[0]["device"] != "cpu" else None
    where = where or f"{host['cpu']}, {threads} thread{'s' * (threads > 1)}"
    text = [f"{where}; PyTorch {record['environment']['torch']}.", ""]
    text += [matmul_table(rows), "", speed_table(rows)]
    for row in rows:
        if row["profile"]:
            text += ["", f"A forward pass of {row['name']}, {row['side']} px, amp {row['amp']}:"]
            text += ["", profile_table(row)]
    return "\n".join(text)


def matmul_table(rows: list[dict[str, Any]]) -> str:
    """How fast the machine multiplied, by type and way."""
    lines = []
    for amp in dict.fromkeys(row["amp"] for row in rows):
        rates = [row["matmul_gflops"] for row in rows if row["amp"] == amp]
        best = {way: max(f[way] for f in rates) for way in rates[0]}
        name = str(DTYPES[amp]).removeprefix("torch.")
        lines.append([name, *(f"{rate:.0f}" for rate in best.values())])
    return markdown(["GFLOP/s", *rows[0]["matmul_gflops"]], lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """A line for each case."""
    head = ["model", "window", "px", "batch", "amp", "pass", "GFLOP", "seconds"]
    head += ["GFLOP/s", "share of best matmul", "share of torch.mm", "peak memory"]
    return markdown(
        head,
        [
            [
                *(str(row[k]) for k in ("name", "window", "side", "batch", "amp", "mode")),
                f"{row['gflop']:.0f}",
                f"{row['seconds']:.3f}",
                f"{row['gflop'] / row['seconds']:.0f}",
                f"{row['share']:.0%}",
                f"{row['share_of_mm']:.0%}",
                f"{row['peak_memory_gb']:.2f} GB",
            ]
            for row in rows
        ],
    )


def profile_table(row: dict[str, Any]) -> str:
    """Where the time of a forward pass goes."""
    whole = sum(part["seconds"] for part in row["profile"])
    rate = max(row["matmul_gflops"].values())
    return markdown(
        ["part", "seconds", "of all", "GFLOP", "share of best matmul"],
        [
            [
                part["part"],
                f"{part['seconds']:.4f}",
                f"{part['seconds'] / whole:.1%}",
                f"{part['gflop']:.1f}",
                f"{part['gflop'] / part['seconds'] / rate:.0%}",
            ]
            for part in row["profile"]
        ],
    )


# ---- the script ----


def read_report(path: str) -> dict[str, Any]:
    """A result file.

    Raises:
        InputError: it is none.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        record["rows"][0]["matmul_gflops"], record["machine"], record["environment"]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise InputError(f"{path}: no result file of benchmarks.speed") from e
    return record


def apart(work: Callable[..., T], *arguments: object) -> T:
    """Call a function in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *arguments).result()


def measure_all(rows: list[Case]) -> Iterator[dict[str, Any]]:
    """Each case in a process of its own, printed as it is done."""
    counted: dict[Case, tuple[int, dict[str, int]]] = {}
    for case in utils.progress(rows, "speed", 0):
        # What the number of FLOPs does not depend on is set to one value.
        same = replace(case, amp="off", compile=False, plain=False, profile=False)
        if same not in counted:
            counted[same] = apart(flops, same)
        row = apart(measure, case, *counted[same])
        took = f"{row['seconds']:.3f} s, {row['share']:.0%} of the best matmul rate"
        print(f"{case.name} {case.side} px, {case.mode}, amp {case.amp}: {took}", file=sys.stderr)
        yield row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    args = parse(argv)
    if args.report:
        print("\n\n".join(summary(read_report(path)) for path in args.report))
        return
    rows = list(measure_all(cases(args)))
    host, environment = machine(), utils.environment()
    record = {"rows": rows, "machine": host, "environment": environment}
    gpu = environment["gpu"] if rows[0]["device"] != "cpu" else None
    name = slug(gpu or f"{host['cpu']} {args.threads}")
    utils.write_json(record, args.output or RESULTS / f"speed_{name}.json")
    print(summary(record))


if __name__ == "__main__":
    utils.run_script(main)
