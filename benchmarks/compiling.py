"""How long torch.compile takes before the first training step: the whole network, or its blocks.

    OMP_NUM_THREADS=1 python -m benchmarks.compiling --swin_type micro --img_size 64
    python -m benchmarks.compiling --device cuda:0

"Whole" is what ``--compile`` does: one graph of network and loss. "Blocks" compiles each Swin block
and each layer of BERT alone, as is usual for language models, whose layers are all alike; those of
Swin have other sizes in each stage. Each way starts in a process of its own with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer

import utils
from args import Parser
from benchmarks import speed
from benchmarks.pages import markdown
from lib.losses import LOSSES
from lib.model import Objective
from lib.runtime import compile_module
from lib.segmentation import MODELS
from lib.swin import SWIN_SIZES, SwinBlock
from lib.training.steps import total_loss

ROOT = Path(__file__).parents[1]
WAYS = ("eager", "whole", "blocks")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    p = Parser(prog="benchmarks.compiling", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", default="lavt", choices=list(MODELS))
    add("--swin_type", default="base", choices=list(SWIN_SIZES))
    add("--window", type=int, default=12)
    add("--img_size", type=int, default=480)
    add("--batch_size", type=int, default=2)
    add("--amp", default="off", choices=("off", "bf16"))
    add("--device", default="cpu")
    add("--backend", default="inductor", help="of torch.compile; aot_eager only traces")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--output", help="JSON file")
    add("--one", choices=WAYS, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the first training step and of later ones, without the optimizer's.

    Args:
        way: one of :data:`WAYS`.
        args: of the benchmark.
    """
    device = torch.device(args.device)
    case = speed.Case(
        *(args.model, args.swin_type, args.window, args.img_size, args.batch_size, args.amp),
        mode="step",
        compile=False,
        plain=True,
        profile=False,
        device=args.device,
        threads=torch.get_num_threads(),
        repeats=1,
    )
    model = speed.build(case, device).train()
    objective: nn.Module = Objective(model, LOSSES["ce"])
    if way == "whole":
        compile_module(objective, args.backend)
    elif way == "blocks":
        for module in model.modules():
            if isinstance(module, SwinBlock | BertLayer):
                compile_module(module, args.backend)
    batch = speed.inputs(case, device)
    batch["image"] = batch["image"].float() / 255

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            losses = objective(batch)
        total_loss(losses).backward()

    first = speed.seconds(step, device)
    return {"way": way, "first": first, "later": min(speed.seconds(step, device) for _ in range(3))}


def in_own_process(way: str, argv: Sequence[str]) -> dict[str, Any]:
    """:func:`measure`, without what an earlier process has compiled."""
    command = [sys.executable, "-m", "benchmarks.compiling", *argv, "--one", way]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["compiled", "seconds of the first step", "of a later step"]
    lines = [[r["way"], f"{r['first']:.1f}", f"{r['later']:.3f}"] for r in rows]
    return markdown(head, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each way, write the file, print the table."""
    args = parse(argv)
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    own = list(sys.argv[1:] if argv is None else argv)
    rows = [in_own_process(way, own) for way in utils.progress(args.ways, "ways", 0)]
    settings = {k: v for k, v in vars(args).items() if k not in ("one", "output", "ways")}
    if args.output:
        record = {"settings": settings, "rows": rows, "machine": speed.machine()}
        utils.write_json(record | {"environment": utils.environment()}, Path(args.output))
    print(table(rows))


if __name__ == "__main__":
    utils.run_script(main)
