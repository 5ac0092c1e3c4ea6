"""Train: parse, build, and for each epoch train, validate, save.

python train.py --dataset refcoco --model_id refcoco ...
torchrun --nproc_per_node 4 train.py ...
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from args import dataset_options, model_options, parse_train
from bert import load_bert, load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import (
    RandomExpressionSampler,
    build_loader,
    one_expression_per_object,
)
from lib import checkpoint, engine, optim
from lib.losses import LOSSES
from lib.metrics import Metrics, summarise
from lib.model import Objective, Segmenter
from lib.pretrained import load_swin_weights
from lib.segmentation import build_model
from refer.refer import REFER
from test import count
from utils import DistInfo, log


@dataclass
class Run:
    """What a training run carries from epoch to epoch."""

    model: Segmenter
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epoch: int = -1  # the last one finished
    best_oIoU: float = -1.0

    def content(self, args: argparse.Namespace) -> dict[str, Any]:
        """The checkpoint of this moment, in the published layout."""
        return {
            **self.model.to_published(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "best_oIoU": self.best_oIoU,
            # A plain dict, not a Namespace: so that safe loading needs no allow-list.
            "args": vars(args),
        }


def build(args: argparse.Namespace, info: DistInfo, steps_per_epoch: int) -> Run:
    """Model, optimizer and schedule; fresh, or continued from ``--resume``."""
    content = checkpoint.read_file(args.resume) if args.resume else None
    utils.seed_everything(args.seed)
    model = build_model(args.model, **model_options(args))
    if content is not None:
        checkpoint.load_model(model, content, args.resume)
    else:
        if not args.text_from_scratch:
            model.load_text(load_bert(args.ck_bert))
        if args.pretrained_swin_weights:
            log.info(load_swin_weights(model, args.pretrained_swin_weights))
    model.to(info.device)
    groups = optim.parameter_groups(model, args.weight_decay, args.lang_layers, args.norm_decay)
    optim.freeze_unused(model, groups)
    optimizer = optim.build_optimizer(groups, args.lr, args.weight_decay, args.amsgrad)
    scheduler = optim.poly_schedule(optimizer, steps_per_epoch * args.epochs)
    run = Run(model, optimizer, scheduler)
    if content is not None:
        checkpoint.load_training(content, args.resume, optimizer, scheduler)
        run.epoch = content["epoch"]
        run.best_oIoU = content.get("best_oIoU", -1.0)  # the release does not store it
    return run


def wrap(objective: Objective, info: DistInfo) -> nn.Module:
    """The module that trains: in DDP where there are several processes."""
    if info.world == 1:
        return objective
    # Statistics agree through SyncBatchNorm, or are averaged before they are used: no process
    # needs another's at each step. Newer torch has another name for that.
    named = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    options: dict[str, Any] = {sync: False}
    if info.device.type == "cuda":
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
        options["device_ids"] = [info.device.index]
    return DistributedDataParallel(objective, **options)


def train_epoch(
    run: Run,
    objective: nn.Module,
    loader: Any,
    args: argparse.Namespace,
    info: DistInfo,
    folder: Path,
) -> float:
    """One epoch; logs every ``--print-freq`` steps and returns the mean loss of this process."""
    # Dropout and drop path then depend on the moment alone, so that a resumed run draws the same.
    utils.seed_everything(args.seed, run.epoch + 1, info.rank)
    steps = engine.train_steps(
        objective, loader, run.optimizer, run.scheduler, info.device, args.amp
    )
    epoch, total = run.epoch + 1, len(loader)
    recent, losses, began = [], [], time.perf_counter()
    for i, step in enumerate(utils.progress(steps, f"epoch {epoch}", info.rank, total)):
        recent.append(step.loss)
        if (i + 1) % args.print_freq and i + 1 != total:
            continue
        mean = torch.stack(recent).mean().item()  # the only synchronisation with the device
        losses.extend([mean] * len(recent))
        recent.clear()
        where = f"epoch {epoch} step {i + 1}/{total}"
        engine.check_finite(mean, where)
        pace = (time.perf_counter() - began) / (i + 1)
        log.info("%s  loss %.4f  lr %.3g  %.3f s/step", where, mean, step.lr, pace)
        if info.is_main:
            record = {"kind": "step", "epoch": epoch, "step": epoch * total + i + 1}
            record |= {"loss": mean, "lr": step.lr, "seconds_per_step": round(pace, 4)}
            utils.append_jsonl(record, folder / "metrics.jsonl")
    return sum(losses) / len(losses)


def validate(run: Run, dataset: ReferDataset, args: argparse.Namespace, info: DistInfo) -> Metrics:
    """Metrics of the validation split, each process evaluating its share."""
    utils.average_buffers(run.model)
    if args.val_expressions == "one":
        indices = one_expression_per_object(dataset.samples_of_ref, args.seed, run.epoch)
    else:
        indices = list(range(len(dataset)))
    return summarise(*count(run.model, dataset, indices, args, info))


def save(run: Run, metrics: Metrics | None, args: argparse.Namespace) -> None:
    """Write model_last, and model_best where oIoU improved."""
    better = metrics is not None and metrics.oIoU > run.best_oIoU
    if better and metrics is not None:
        run.best_oIoU = metrics.oIoU
    content = run.content(args)
    output = Path(args.output_dir)
    if better:
        checkpoint.write_file(content, output / f"model_best_{args.model_id}.pth")
        log.info("better than before: oIoU %.2f", run.best_oIoU)
    checkpoint.write_file(content, output / f"model_last_{args.model_id}.pth")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_train(argv)
    info = utils.init_distributed(args.device, args.local_rank)
    tokenizer = load_tokenizer(args.bert_tokenizer)
    refer = REFER(args.refer_data_root, args.dataset, args.splitBy, image_root=args.image_root)
    train_set, val_set = (
        ReferDataset(refer, split, tokenizer, **dataset_options(args))
        for split in ("train", args.val_split)
    )
    for dataset in (train_set, val_set):
        dataset.check_images()
    sampler = RandomExpressionSampler(
        train_set.samples_of_ref, args.batch_size, args.seed, info.rank, info.world
    )
    loader = build_loader(train_set, sampler, args.workers, args.pin_mem)
    folder = Path("models") / args.model_id
    utils.setup_logging(folder, info.rank)
    run = build(args, info, len(sampler))
    if info.is_main:
        utils.make_folder(Path(args.output_dir))
        utils.start_jsonl(folder / "metrics.jsonl", (run.epoch + 1) * len(sampler))
        utils.write_json(vars(args) | {"environment": utils.environment()}, folder / "args.json")
    log.info("%d objects, %d steps an epoch, %s", len(train_set.samples_of_ref), len(sampler), info)
    objective = wrap(Objective(run.model, LOSSES[args.loss]), info)

    stop = min(args.epochs, run.epoch + 1 + args.stop_after) if args.stop_after else args.epochs
    while run.epoch + 1 < stop:
        began = time.perf_counter()
        sampler.set_epoch(run.epoch + 1)
        loss = train_epoch(run, objective, loader, args, info, folder)
        run.epoch += 1
        metrics = None
        if (run.epoch + 1) % args.eval_every == 0 or run.epoch + 1 == args.epochs:
            metrics = validate(run, val_set, args, info)
            log.info("epoch %d  oIoU %.2f  mIoU %.2f", run.epoch, metrics.oIoU, metrics.mIoU)
        else:
            utils.average_buffers(run.model)
        if info.is_main:
            save(run, metrics, args)
            record = {"kind": "epoch", "epoch": run.epoch, "step": (run.epoch + 1) * len(sampler)}
            record |= {"loss": loss, "seconds": round(time.perf_counter() - began, 2)}
            record |= {"peak_memory_gb": round(utils.peak_memory_gb(info.device), 3)}
            if metrics is not None:
                record |= {"val": metrics.as_dict()}
            utils.append_jsonl(record, folder / "metrics.jsonl")
        utils.barrier()
    log.info("done: %s", Path(args.output_dir) / f"model_best_{args.model_id}.pth")


if __name__ == "__main__":
    utils.run_script(main)
