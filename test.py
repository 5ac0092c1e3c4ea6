"""Evaluate a checkpoint: all expressions of all objects of one or more splits.

python test.py --dataset refcoco --split val --resume ./checkpoints/refcoco.pth ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

import utils
from args import dataset_options, model_options, parse_test
from bert import load_tokenizer
from data.dataset_refer_bert import OtherObjectSentences, ReferDataset
from data.loaders import ShardedBatches, build_loader
from lib import checkpoint, engine
from lib.metrics import Metrics, summarise
from lib.model import Segmenter
from lib.segmentation import build_model
from refer.refer import REFER
from utils import DistInfo, log

Table = list[tuple[str, Metrics]]


def count(
    model: Segmenter, dataset: Dataset, indices: list[int], args: argparse.Namespace, info: DistInfo
) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union of the samples ``indices``, shared between the processes."""
    batches = ShardedBatches(indices, args.batch_size, info.rank, info.world)
    size = len(dataset)  # type: ignore[arg-type]
    counts = engine.evaluate(
        model,
        build_loader(dataset, batches, args.workers, args.pin_mem),
        size,
        info.device,
        args.amp,
        lambda items: utils.progress(items, "evaluation", info.rank, len(batches)),
    )
    utils.all_reduce_sum(counts.table)
    return counts.of(indices)


def evaluate_split(
    model: Segmenter, dataset: ReferDataset, args: argparse.Namespace, info: DistInfo
) -> dict[str, Metrics]:
    """Metrics of a split: 'all', each 'kind: …' where known, and with ``--control`` that too."""
    indices = list(range(len(dataset)))
    inter, union = count(model, dataset, indices, args, info)
    rows = {"all": summarise(inter, union)}
    kinds = dataset.kinds()
    if kinds:
        of_sample = np.array([kinds.get(r.sent_id, "unknown") for r in dataset.records])
        for kind in sorted(set(of_sample)):
            rows[f"kind: {kind}"] = summarise(inter[of_sample == kind], union[of_sample == kind])
    if args.control:
        control = OtherObjectSentences(dataset)
        if control.indices:
            rows["same, right sentence"] = summarise(inter[control.indices], union[control.indices])
            wrong = count(model, control, control.indices, args, info)
            rows["same, sentence of another object"] = summarise(*wrong)
    return rows


def format_table(rows: Table) -> str:
    """Rows as papers print them, under a header."""
    width = max(len(name) for name, _ in rows)
    head = ["P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9", "oIoU", "mIoU", "n"]
    lines = [" " * width + "".join(f"{h:>8}" for h in head)]
    for name, m in rows:
        values = [*m.precision.values(), m.oIoU, m.mIoU]
        cells = "".join(f"{v:8.2f}" for v in values)
        lines.append(f"{name:<{width}}{cells}{m.samples:>8}")
    return "\n".join(lines)


def protocol(args: argparse.Namespace) -> str:
    """What the numbers mean, in words; says so where it is not the published protocol."""
    overlap = "background" if args.mask_mode == "release" else "object (not the published protocol)"
    return (
        f"every expression alone, raw text, IoU at {args.img_size} x {args.img_size}, "
        f"pixels in two polygons of an object are {overlap}"
    )


def results(
    args: argparse.Namespace, splits: dict[str, dict[str, Metrics]], content_hash: str
) -> dict[str, Any]:
    """The record of an evaluation."""
    return {
        "splits": {
            split: {name: m.as_dict() for name, m in rows.items()} for split, rows in splits.items()
        },
        "protocol": protocol(args),
        "checkpoint": {"path": str(args.resume), "sha256": content_hash},
        "args": vars(args),
        "environment": utils.environment(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse_test(argv)
    info = utils.init_distributed(args.device, args.local_rank)
    utils.setup_logging(None, info.rank)
    content = checkpoint.read_file(args.resume)
    model = build_model(args.model, **model_options(args))
    checkpoint.load_model(model, content, args.resume)
    model.to(info.device)
    tokenizer = load_tokenizer(args.bert_tokenizer)
    refer = REFER(args.refer_data_root, args.dataset, args.splitBy, image_root=args.image_root)
    datasets = {
        split: ReferDataset(refer, split, tokenizer, **dataset_options(args))
        for split in args.splits
    }
    for dataset in datasets.values():
        dataset.check_images()
    splits: dict[str, dict[str, Metrics]] = {}
    for split, dataset in datasets.items():
        log.info("%s %s: %d expressions", args.dataset, split, len(dataset))
        splits[split] = evaluate_split(model, dataset, args, info)
        log.info("%s", splits[split]["all"].release_text())
    log.info(
        "%s",
        format_table([(f"{s} {n}", m) for s, rows in splits.items() for n, m in rows.items()]),
    )
    if info.is_main:
        name = f"results_{args.dataset}_{args.splitBy}_{'_'.join(args.splits)}.json"
        path = Path(args.results or Path("models") / args.model_id / name)
        utils.write_json(results(args, splits, checkpoint.file_hash(args.resume)), path)
        log.info("written: %s", path)


if __name__ == "__main__":
    utils.run_script(main)
