"""How much of an evaluation is the model's own forward pass, and what sharing pictures saves.

    python -m benchmarks.evaluation --refer_data_root quickstart/data --ck_bert quickstart/data/bert

Times, turn by turn, so that a busy neighbour slows all: the forward passes alone, on batches that
lie ready; the whole evaluation of ``test.py`` (a worker reads, decodes and resizes; pixels are
counted); the same with a picture for every sentence; one sentence at a time; and in float32 the
network's plain form in PyTorch, one sentence at a time. In float32 their metrics must be the same
to the last digit. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import utils
from args import Parser
from benchmarks.pages import markdown
from benchmarks.speed import DTYPES, machine
from bert import load_tokenizer
from data import loaders
from data.dataset_refer_bert import ReferDataset
from data.loaders import ShardedBatches, build_loader
from lib.errors import InputError
from lib.evaluation import evaluator
from lib.evaluation.metrics import summarise
from lib.segmentation import build_model
from refer.refer import REFER

ALONE = "forward passes alone"
PLAIN = "the plain form, one sentence at a time"


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
    p.add_argument("--amp", default="off,bf16", help=f"comma-separated, of {', '.join(DTYPES)}")
    p.add_argument("--device", default="cuda:0", help="the CPU where there is no CUDA")
    p.add_argument("--output", help="JSON file")
    return p.parse_args(argv)


def whole(
    model: torch.nn.Module,
    data: ReferDataset,
    indices: list[int],
    args: argparse.Namespace,
    device: torch.device,
    amp: str,
    batch_size: int,
    sharing: bool,
    warm: Callable[[], object],
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Seconds and counts of an evaluation, as it goes once it is under way.

    Its workers have been started, and ``warm`` was called since: forking makes the next writes to
    memory slow, once.
    """
    order = data.by_picture(indices) if sharing else indices
    batches = ShardedBatches(order, batch_size)
    loader = build_loader(data, batches, args.workers, sharing=sharing)
    for _ in loader:
        pass
    warm()
    began = time.perf_counter()
    counts = evaluator.evaluate(model, loader, len(data), device, amp)
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
            evaluator.expression_logits(model, loaders.to_device(batch, device), amp)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    used = result["args"]
    text = (
        f"Evaluation, lavt {used['swin_type']}, {used['img_size']} px: {result['sentences']} "
        f"sentences about {result['pictures']} pictures; metrics of float32 "
        f"{'the same' if result['same_metrics'] else 'DIFFERENT'}."
    )
    head = ("amp", "", "seconds", "sentences a second", "of the forward rate")
    rows = [
        (
            row["amp"],
            row["way"],
            f"{row['seconds']:.2f}",
            f"{row['sentences_per_second']:.2f}",
            f"{row['of_forward']:.0%}",
        )
        for row in result["rows"]
    ]
    return f"{text}\n\n{markdown(head, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    amps = args.amp.split(",")
    if not set(amps) <= set(DTYPES):
        raise InputError(f"--amp {args.amp}: choose of {', '.join(DTYPES)}")
    device = utils.init_distributed(args.device).device
    utils.setup_logging(None, 0)
    tokenizer = load_tokenizer(args.ck_bert)
    refer = REFER(args.refer_data_root, args.dataset, args.splitBy)
    data = ReferDataset(refer, args.split, tokenizer, args.img_size)
    torch.manual_seed(0)
    build = partial(
        build_model,
        "lavt",
        swin_type=args.swin_type,
        window_size=args.window,
        text_config=args.ck_bert,
    )
    model, plain = build().to(device).eval(), build(accelerate=False).to(device).eval()
    plain.load_state_dict(model.state_dict())
    indices = list(range(len(data)))[: args.sentences]
    ordered = ShardedBatches(data.by_picture(indices), args.batch_size)
    ready = list(build_loader(data, ordered, sharing=True))
    ways = {
        "evaluation": (args.batch_size, True),
        "evaluation, a picture for every sentence": (args.batch_size, False),
        "evaluation, one sentence at a time": (1, False),
    }
    times: dict[tuple[str, str], list[float]] = {}
    found: dict[tuple[str, str], Any] = {}
    for _, amp in itertools.product(range(args.rounds), amps):
        warm = partial(alone, model, ready[:1], device, amp)
        warm()
        seconds = alone(model, ready, device, amp)
        times.setdefault((amp, ALONE), []).append(seconds)
        for way, (size, sharing) in ways.items():
            seconds, counts = whole(model, data, indices, args, device, amp, size, sharing, warm)
            times.setdefault((amp, way), []).append(seconds)
            found[amp, way] = counts
        if amp == "off":
            seconds, counts = whole(plain, data, indices, args, device, amp, 1, False, warm)
            times.setdefault((amp, PLAIN), []).append(seconds)
    rows = [
        {
            "amp": amp,
            "way": way,
            "seconds": min(taken),
            "sentences_per_second": len(indices) / min(taken),
            "of_forward": min(times[amp, ALONE]) / min(taken),
        }
        for (amp, way), taken in times.items()
    ]
    metrics = {pair: summarise(*counts).as_dict() for pair, counts in found.items()}
    exact = [m for (amp, _), m in metrics.items() if amp == "off"]
    result = {
        "rows": sorted(rows, key=lambda row: amps.index(row["amp"])),
        "metrics": [{"amp": amp, "way": way, **m} for (amp, way), m in metrics.items()],
        "same_metrics": all(m == exact[0] for m in exact),
        "sentences": len(indices),
        "pictures": len({data.records[i].image_id for i in indices}),
        "args": {k: v for k, v in vars(args).items() if k != "output"},
        "machine": machine(),
        "environment": utils.environment(),
    }
    print(table(result))
    if args.output:
        utils.write_json(result, args.output)


if __name__ == "__main__":
    utils.run_script(main)
