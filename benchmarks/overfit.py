"""Overfit the real expressions of a tiny RefCOCO: the whole chain learns real images.

    python -m benchmarks.overfit --refer_data_root ROOT --ck_bert MINILM --bert_tokenizer MINILM

Takes every object with expressions by people (val, testA and testB of refcoco, val of refcocog),
trains on all of them with train.py's own parts, and prints the mIoU on the same samples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

import utils
from args import Parser
from bert import load_bert, load_tokenizer
from data.dataset_refer_bert import ReferDataset, Sample
from data.loaders import ShardedBatches, build_loader
from lib import runtime
from lib.evaluation.evaluator import EvalConfig, evaluate
from lib.evaluation.metrics import summarise
from lib.losses import LOSSES
from lib.model import Objective
from lib.segmentation import MODELS, build_model
from lib.swin import SWIN_SIZES
from lib.training import optim, steps
from refer.refer import REFER

PARTS = {("refcoco", "unc"): ("val", "testA", "testB"), ("refcocog", "umd"): ("val",)}


class Joined(Dataset[Sample]):
    """Several datasets as one."""

    def __init__(self, parts: Sequence[ReferDataset]) -> None:
        self.parts = parts
        self.joined: ConcatDataset[Sample] = ConcatDataset(parts)
        self.objects = sum(len(part.samples_of_ref) for part in parts)

    def __len__(self) -> int:
        return len(self.joined)

    def __getitem__(self, index: int) -> Sample:
        sample = self.joined[index]
        sample["index"] = index
        return sample


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    p = Parser(prog="benchmarks.overfit", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--refer_data_root", required=True)
    p.add_argument("--ck_bert", required=True, help="hub name or folder")
    p.add_argument("--bert_tokenizer", required=True, help="hub name or folder")
    p.add_argument("--swin_type", default="micro", choices=list(SWIN_SIZES))
    p.add_argument("--img_size", type=int, default=224)
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--loss", default="dice", choices=list(LOSSES))
    p.add_argument("--amp", default="auto", choices=runtime.AMP)
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--target", type=float, default=90.0, help="mIoU that passes")
    p.add_argument("--output", default=None, help="JSON file for the result")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate on the same samples, and fail below the target."""
    args = parse(argv)
    utils.setup_logging(None, 0)
    info = utils.init_distributed(args.device)
    tokenizer = load_tokenizer(args.bert_tokenizer)
    data = Joined(
        [
            ReferDataset(
                REFER(args.refer_data_root, name, split_by),
                split,
                tokenizer,
                args.img_size,
                MODELS["lavt_one"].max_tokens,
            )
            for (name, split_by), splits in PARTS.items()
            for split in splits
        ]
    )
    utils.seed_everything(0)
    model = build_model(
        "lavt_one",
        swin_type=args.swin_type,
        window_size=7,
        text_config=args.ck_bert,
        drop_path=0.0,
        ape_grid=args.img_size // 4,
        text_dropout=False,
    )
    model.load_text(load_bert(args.ck_bert))
    model.to(info.device)
    groups = optim.parameter_groups(model, 0.0, None)
    optim.freeze_unused(model, groups)
    optimizer = optim.build_optimizer(groups, args.lr)
    scheduler = optim.poly_schedule(optimizer, args.steps)

    objective = Objective(model, LOSSES[args.loss])
    began, step, losses = time.perf_counter(), 0, []
    rng = np.random.default_rng(0)
    while step < args.steps:
        order = rng.permutation(len(data))[: len(data) // args.batch_size * args.batch_size]
        loader = build_loader(data, ShardedBatches(order.tolist(), args.batch_size))
        for done in steps.train_steps(
            objective, loader, optimizer, scheduler, info.device, steps.StepOptions(args.amp)
        ):
            losses.append(done.loss)
            step += 1
            if step % 50 == 0:
                utils.log.info("step %d  loss %.4f", step, torch.stack(losses[-50:]).mean())
            if step == args.steps:
                break
    config = EvalConfig(args.batch_size, amp=args.amp)
    counts = [evaluate(model, p, list(range(len(p))), config, info) for p in data.parts]
    metrics = summarise(*map(np.concatenate, zip(*counts, strict=True)))
    utils.log.info(
        "%d objects, %d expressions, %d steps, %.0f s: train mIoU %.2f, oIoU %.2f (target %.0f)",
        *(data.objects, len(data), step, time.perf_counter() - began),
        *(metrics.mIoU, metrics.oIoU, args.target),
    )
    if args.output:
        record = {"metrics": metrics.as_dict(), "objects": data.objects, "args": vars(args)}
        utils.write_json(record | {"environment": utils.environment()}, Path(args.output))
    if metrics.mIoU < args.target:
        raise SystemExit(1)


if __name__ == "__main__":
    utils.run_script(main)
