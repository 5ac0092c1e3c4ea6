"""How much of an evaluation is the model's own forward pass, and what sharing pictures saves.

    python -m benchmarks.evaluation --refer_data_root quickstart/data --ck_bert quickstart/data/bert

Times, turn by turn, so that a busy neighbour slows all: the forward passes alone, on batches that
lie ready; the whole evaluation of ``test.py`` (a worker reads, decodes and resizes; pixels are
counted); the same with a picture for every sentence; and one sentence at a time. Their metrics must
be the same. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import utils
from args import Parser
from benchmarks.speed import machine
from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import ShardedBatches, build_loader
from lib import engine
from lib.metrics import summarise
from lib.segmentation import build_model
from refer.refer import REFER


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(prog="benchmarks.evaluation", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--refer_data_root", required=True)
    p.add_argument("--ck_bert", required=True, help="folder of a BERT; its weights are not used")
    p.add_argument("--dataset", default="refcoco")
    p.add_argument("--splitBy", default="unc")
    p.add_argument("--split", default="val")
    p.add_argument("--swin_type", default="tiny")
    p.add_argument("--window", type=int, default=7)
    p.add_argument("--img_size", type=int, default=480)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--sentences", type=int, default=48)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--amp", default="off", choices=engine.AMP)
    p.add_argument("--device", default="cuda:0", help="the CPU where there is no CUDA")
    p.add_argument("--output", help="JSON file")
    return p.parse_args(argv)


def whole(
    model: torch.nn.Module,
    data: ReferDataset,
    indices: list[int],
    args: argparse.Namespace,
    device: torch.device,
    batch_size: int,
    sharing: bool,
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Seconds and counts of an evaluation; its loader has been started before."""
    order = data.by_picture(indices) if sharing else indices
    batches = ShardedBatches(order, batch_size)
    loader = build_loader(data, batches, args.workers, sharing=sharing)
    began = time.perf_counter()
    counts = engine.evaluate(model, loader, len(data), device, args.amp)
    found = counts.of(indices)
    return time.perf_counter() - began, found


def alone(
    model: torch.nn.Module,
    batches: list[dict[str, Any]],
    device: torch.device,
    amp: str,
) -> float:
    """Seconds of the forward passes of batches that lie ready."""
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            engine.expression_logits(model, engine.to_device(batch, device), amp)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    used = result["args"]
    lines = [
        f"Evaluation, lavt {used['swin_type']}, {used['img_size']} px, amp {used['amp']}: "
        f"{result['sentences']} sentences about {result['pictures']} pictures; metrics "
        f"{'the same' if result['same_metrics'] else 'DIFFERENT'}.",
        "",
        "| | seconds | sentences a second | of the forward rate |",
        "|---|---|---|---|",
    ]
    for way, row in result["rows"].items():
        lines.append(
            f"| {way} | {row['seconds']:.2f} | {row['sentences_per_second']:.2f} "
            f"| {row['of_forward']:.0%} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    device = utils.init_distributed(args.device).device
    utils.setup_logging(None, 0)
    tokenizer = load_tokenizer(args.ck_bert)
    refer = REFER(args.refer_data_root, args.dataset, args.splitBy)
    data = ReferDataset(refer, args.split, tokenizer, args.img_size)
    torch.manual_seed(0)
    model = build_model(
        "lavt", swin_type=args.swin_type, window_size=args.window, text_config=args.ck_bert
    )
    model.to(device).eval()
    indices = list(range(len(data)))[: args.sentences]
    ordered = ShardedBatches(data.by_picture(indices), args.batch_size)
    ready = list(build_loader(data, ordered, sharing=True))
    ways = {
        "evaluation": (args.batch_size, True),
        "evaluation, a picture for every sentence": (args.batch_size, False),
        "evaluation, one sentence at a time": (1, False),
    }
    times: dict[str, list[float]] = {"forward passes alone": [], **{way: [] for way in ways}}
    found: dict[str, Any] = {}
    alone(model, ready[:1], device, args.amp)
    for _ in range(args.rounds):
        times["forward passes alone"].append(alone(model, ready, device, args.amp))
        for way, (size, sharing) in ways.items():
            seconds, found[way] = whole(model, data, indices, args, device, size, sharing)
            times[way].append(seconds)
    best = {way: min(seconds) for way, seconds in times.items()}
    base = best["forward passes alone"]
    rows = {
        way: {"seconds": s, "sentences_per_second": len(indices) / s, "of_forward": base / s}
        for way, s in best.items()
    }
    metrics = {way: summarise(*counts).as_dict() for way, counts in found.items()}
    printed = {f"{m['mIoU']:.2f} {m['oIoU']:.2f}" for m in metrics.values()}
    pictures = sum(len(batch["image"]) for batch in ready)
    result = {
        "rows": rows,
        "metrics": metrics,
        "same_metrics": len(printed) == 1,
        "sentences": len(indices),
        "pictures": pictures,
        "args": vars(args),
        "machine": machine(),
        "environment": utils.environment(),
    }
    print(table(result))
    if args.output:
        utils.write_json(result, args.output)


if __name__ == "__main__":
    utils.run_script(main)
