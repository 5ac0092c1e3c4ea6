"""Measure how much of an evaluation is the model's forward pass.

    python -m benchmarks.evaluation --refer_data_root quickstart/data --ck_bert quickstart/data/bert

Times the forward passes alone, on batches in memory, and the whole evaluation of test.py (a worker
reads, decodes and resizes; pixels are counted), in turn, so that other programs slow both. Prints a
table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

import utils
from args import Parser
from benchmarks.pages import markdown
from benchmarks.speed import DTYPES, machine
from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import ShardedBatches, build_loader, prepare_batch
from lib.errors import InputError
from lib.evaluation.evaluator import EvalConfig, evaluate, expression_logits
from lib.segmentation import build_model
from refer.refer import REFER


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    p = Parser(prog="benchmarks.evaluation", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--refer_data_root", required=True)
    p.add_argument("--ck_bert", required=True, help="folder of a BERT; its weights are not used")
    p.add_argument("--dataset", default="refcoco")
    p.add_argument("--splitBy", default="unc")
    p.add_argument("--split", default="val")
    p.add_argument("--swin_type", default="tiny")
    p.add_argument("--window", type=int, default=7)
    p.add_argument("--img_size", type=int, default=480)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--expressions", type=int, default=48)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--amp", default="off,bf16", help=f"comma-separated, of {', '.join(DTYPES)}")
    p.add_argument("--device", default="cuda:0", help="the CPU if there is no CUDA")
    p.add_argument("--output", help="JSON file")
    return p.parse_args(argv)


def forward_seconds(
    model: torch.nn.Module, batches: list[dict[str, Any]], device: torch.device, amp: str
) -> float:
    """Seconds of the forward passes of batches in memory."""
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            expression_logits(model, prepare_batch(batch, device), amp)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    used = result["args"]
    text = f"Evaluation, lavt {used['swin_type']}, {used['img_size']} px: "
    text += f"{result['expressions']} expressions about {result['images']} images."
    head = ("amp", "forward, s", "evaluation, s", "expressions a second", "forward's part")
    rows = [
        (
            row["amp"],
            f"{row['forward']:.2f}",
            f"{row['evaluation']:.2f}",
            f"{result['expressions'] / row['evaluation']:.2f}",
            f"{row['forward'] / row['evaluation']:.0%}",
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
    info = utils.init_distributed(args.device)
    utils.setup_logging(None, 0)
    refer = REFER(args.refer_data_root, args.dataset, args.splitBy)
    data = ReferDataset(refer, args.split, load_tokenizer(args.ck_bert), args.img_size)
    torch.manual_seed(0)
    options = {"swin_type": args.swin_type, "window_size": args.window}
    model = build_model("lavt", text_config=args.ck_bert, **options).to(info.device).eval()
    indices = list(range(len(data)))[: args.expressions]
    batches = ShardedBatches(data.group_by_image(indices), args.batch_size)
    ready = list(build_loader(data, batches))
    rows = []
    for amp in amps:
        forward, whole = [], []
        config = EvalConfig(args.batch_size, args.workers, amp=amp)
        forward_seconds(model, ready[:1], info.device, amp)
        for _ in range(args.rounds):
            forward.append(forward_seconds(model, ready, info.device, amp))
            began = time.perf_counter()
            counts = evaluate(model, data, indices, config, info)
            whole.append(time.perf_counter() - began)
        row = {"amp": amp, "forward": min(forward), "evaluation": min(whole)}
        rows.append(row | {"metrics": counts.summarise().as_dict()})
    result = {
        "rows": rows,
        "expressions": len(indices),
        "images": len({data.records[i].image_id for i in indices}),
        "args": {k: v for k, v in vars(args).items() if k != "output"},
        "machine": machine(),
        "environment": utils.environment(),
    }
    if args.output:
        utils.write_json(result, args.output)
    print(table(result))


if __name__ == "__main__":
    utils.run_script(main)
