"""Evaluate a checkpoint: all expressions of all objects of one or more splits.

python test.py --dataset refcoco --split val --resume ./checkpoints/refcoco.pth ...
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import utils
from args import (
    dataset_options,
    model_options,
    parse_test,
    protocol_of,
    refer_options,
    speed_options,
)
from bert import load_tokenizer
from data.dataset_refer_bert import OtherObjectSentences, ReferDataset
from data.loaders import ShardedBatches, build_loader, one_expression_per_object
from lib import checkpoint, runtime
from lib.evaluation import evaluator, predictions, published, tables
from lib.evaluation.metrics import summarise
from lib.evaluation.protocol import Protocol, warning
from lib.evaluation.summary import Summary, summary
from lib.model import Segmenter
from lib.segmentation import build_model
from refer.refer import REFER
from utils import DistInfo, log

Write = Callable[[evaluator.SamplePrediction], None]


def count(
    model: Segmenter,
    dataset: ReferDataset | OtherObjectSentences,
    indices: list[int],
    args: argparse.Namespace,
    info: DistInfo,
    answer: Write | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union of the samples ``indices``, shared between the processes."""
    # Side by side, the sentences about a picture share it.
    together = dataset.by_picture(indices)
    batches = ShardedBatches(together, args.batch_size, info.rank, info.world)
    size = len(dataset)
    counts = evaluator.evaluate(
        model,
        build_loader(dataset, batches, args.workers, args.pin_mem, sharing=True),
        size,
        info.device,
        args.amp,
        lambda items: utils.progress(items, "evaluation", info.rank, len(batches)),
        at_photo=getattr(args, "eval_size", "model") == "original",
        answer=answer,
    )
    utils.all_reduce_sum(counts.table)
    return counts.of(indices)


def evaluate_split(
    model: Segmenter,
    dataset: ReferDataset,
    args: argparse.Namespace,
    info: DistInfo,
    answer: Write | None = None,
) -> Summary:
    """Numbers of a split; ``answer`` takes what this process found for each of its samples."""
    samples = list(range(len(dataset)))
    if args.val_expressions == "one":
        samples = one_expression_per_object(dataset.samples_of_ref, args.seed, 0)
    inter, union = count(model, dataset, samples, args, info, answer)
    objects = [dataset.records[i].ann_id for i in samples]
    kinds = dataset.sample_kinds()
    found = summary(inter, union, objects, [kinds[i] for i in samples])
    if args.control:
        control = OtherObjectSentences(dataset)
        if chosen := sorted(set(samples) & set(control.indices)):
            same = np.isin(samples, chosen)
            found.rows["same, right sentence"] = summarise(inter[same], union[same])
            wrong = count(model, control, chosen, args, info)
            found.rows["same, sentence of another object"] = summarise(*wrong)
    return found


@contextlib.contextmanager
def recording(
    path: str | None, protocol: str, info: DistInfo
) -> Iterator[Callable[[ReferDataset], Write | None]]:
    """Write what is predicted for every sample of one split after another, by all processes.

    Args:
        path: of the file; None writes none.
        protocol: label of the evaluation's protocol.
        info: this process among all.

    Yields:
        What gives each split, in turn, the function that takes the answers to its samples.
    """
    if path is None:
        yield lambda _: None
        return
    part, before = predictions.Part(Path(path), info.rank), 0

    def writer(dataset: ReferDataset) -> Write:
        nonlocal before
        first, kinds = before, dataset.sample_kinds()
        before += len(dataset)

        def write(answer: evaluator.SamplePrediction) -> None:
            kind = kinds[answer.sample]
            about = dataset.describe(answer.sample) | ({"kind": kind} if kind else {})
            part.write(first + answer.sample, predictions.line(about, answer, protocol))

        return write

    try:
        yield writer
        part.close()
    except BaseException:
        part.discard()
        raise
    utils.barrier()
    if info.is_main:
        predictions.merge_parts(Path(path), info.world)
        log.info("written: %s", path)


def tabulate(
    args: argparse.Namespace,
    protocol: Protocol,
    datasets: dict[str, ReferDataset],
    splits: dict[str, Summary],
) -> tables.Results:
    """The splits beside what is published for them."""
    entries = []
    for split, found in splits.items():
        data, dataset = (args.dataset, args.splitBy, split), datasets[split]
        known = published.look_up(
            args.model, data, protocol, len(dataset.samples_of_ref), dataset.expressions
        )
        entries.append(tables.Entry(split, found, known))
    facts = {"dataset": args.dataset, "splitBy": args.splitBy, "model": args.model}
    title = f"{tables.NAMES[args.dataset]} ({args.splitBy}), {args.model}"
    return tables.Results(title, facts, protocol.label, entries)


def write(
    args: argparse.Namespace,
    protocol: Protocol,
    splits: dict[str, Summary],
    results: tables.Results,
    info: DistInfo,
) -> None:
    """Write the record of an evaluation, and its tables beside it."""
    path = Path(args.results)
    content = {
        "splits": {split: found.as_dict() for split, found in splits.items()},
        "protocol": protocol.as_dict(),
        "checkpoint": {"path": str(args.resume), "sha256": checkpoint.file_hash(args.resume)},
        "args": vars(args),
        "seed": args.seed,
        "environment": utils.environment() | {"device": str(info.device)},
    }
    utils.write_json(content, path)
    for written in [path, *tables.write_tables(results, path)]:
        log.info("written: %s", written)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse_test(argv)
    info = utils.init_distributed(args.device, args.local_rank)
    utils.setup_logging(None, info.rank)
    content = checkpoint.read_file(args.resume)
    model = build_model(args.model, **model_options(args))
    checkpoint.load_model(model, content, args.resume)
    runtime.prepare(model.to(info.device), **speed_options(args))
    tokenizer = load_tokenizer(args.bert_tokenizer)
    refer = REFER(**refer_options(args))
    datasets = {
        split: ReferDataset(refer, split, tokenizer, **dataset_options(args))
        for split in args.splits
    }
    for dataset in datasets.values():
        dataset.check_images()
    if info.is_main:
        utils.make_folder(Path(args.results).parent)
    protocol = protocol_of(args)
    splits: dict[str, Summary] = {}
    with recording(args.predictions, protocol.label, info) as writer:
        for split, dataset in datasets.items():
            log.info("%s %s: %d samples", args.dataset, split, len(dataset))
            if not protocol.is_standard:
                log.info("%s", warning(protocol.label))
            splits[split] = evaluate_split(model, dataset, args, info, writer(dataset))
            log.info("%s", splits[split].rows["all"].release_text())
    results = tabulate(args, protocol, datasets, splits)
    log.info("%s", tables.as_text(results))
    if info.is_main:
        write(args, protocol, splits, results, info)


if __name__ == "__main__":
    utils.run_script(main)
