"""Train a model: parse the command line, build everything, run.

python train.py --dataset refcoco --model_id refcoco ...
torchrun --nproc_per_node 4 train.py ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from args import (
    compare_args,
    dataset_options,
    model_options,
    parse_train,
    parts,
    protocol_of,
    refer_options,
    select,
)
from bert import (
    check_vocabulary,
    load_bert,
    load_tokenizer,
    tokenizer_text,
    vocabulary_in,
    vocabulary_of,
)
from data.dataset_refer_bert import ReferDataset, merge
from data.loaders import RandomExpressionSampler
from lib import checkpoint, runtime
from lib.errors import InputError
from lib.losses import parse_losses
from lib.model import Segmenter
from lib.segmentation import build_model
from lib.training import optim
from lib.training.methods import Methods
from lib.training.state_files import StateFiles
from lib.training.trainer import TrainConfig, Trainer
from lib.variants import trained_with
from refer.refer import REFER
from utils import DistInfo, StopSignals, log

if TYPE_CHECKING:
    from bert.tokenizer import Tokenizer
    from data.mixed import MixedDataset


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_train(argv)
    with StopSignals() as signals:
        train(args, signals)


def train(args: argparse.Namespace, signals: StopSignals) -> None:
    """Build everything, then train.

    Raises:
        Stopped: a signal came.
    """
    if args.tf32:
        runtime.allow_tf32()
    if args.deterministic:
        utils.make_deterministic()
    info = utils.init_distributed(args.device, args.local_rank, training=True)
    utils.setup_logging(None, info.rank)
    if args.fast:
        log.info("--fast: %s", args.fast)
    resume, reasons = choose_checkpoint(args, info)
    content = checkpoint.read_checkpoint(resume) if resume else None
    if content is not None and nothing_left(args, content, resume):
        return
    tokenizer = load_tokenizer(args.bert_tokenizer)
    args.vocabulary = vocabulary_of(tokenizer)
    train_set, val_set = open_datasets(args, tokenizer)
    for dataset in (train_set, val_set):
        dataset.check_images()
    methods = select(Methods, args)
    maskris = methods.build_maskris(tokenizer, args.img_size)
    reorder: Any = list
    if args.spread_no_target:
        from data.spread import spreader

        reorder = spreader(train_set)
    ranks = (info.rank, info.world, args.accumulate)
    drawn_from = train_set.training_samples
    sampler = RandomExpressionSampler(drawn_from, args.batch_size, args.seed, *ranks, reorder)
    train_set, sampler = methods.with_mosaics(train_set, sampler)
    utils.setup_logging(Path("models") / args.model_id, info.rank)
    for reason in reasons:
        log.warning("not resumed: %s", reason)
    if args.resume == "auto" or utils.restarts():
        log.info("%s", f"resuming {resume}" if resume else "starting fresh")
    model = prepare_model(args, info, content, resume)
    pretrained = not (resume or args.init_from or args.text_from_scratch)
    known = vocabulary_in(args.ck_bert) if pretrained else model.trained_with.get("vocabulary")
    check_vocabulary(tokenizer, model, known)
    groups = optim.parameter_groups(model, args.weight_decay, args.lang_layers, args.norm_decay)
    optim.freeze_unused(model, groups)
    total_batch = info.world * args.batch_size * args.accumulate
    lr = optim.scaled_lr(args.lr, total_batch, args.scale_lr)
    groups = methods.refine_groups(model, groups, lr)
    for line in optim.describe_groups(model, groups, lr, args.lang_layers):
        log.info("%s", line)
    optimizer = optim.build_optimizer(groups, lr, args.amsgrad)
    steps = len(sampler) // args.accumulate
    scheduler = methods.build_schedule(optimizer, lr, steps * args.epochs, resumed=bool(resume))
    losses = parse_losses(args.loss)
    config = select(TrainConfig, args, protocol=protocol_of(args).label, loss=losses)
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_set=train_set,
        val_set=val_set,
        sampler=sampler,
        config=config,
        arguments=vars(args),
        tokenizer=tokenizer_text(tokenizer),
        seen_images=merge(train_set.seen_images, model.seen_images),
        maskris=maskris,
        average=methods.build_average(model),
        info=info,
        signals=signals,
    )
    if content is not None:
        trainer.load_state_dict(content, resume)
        for difference in compare_args(model.trained_with, args):
            log.info("%s", difference)
    if info.is_main:
        trainer.prepare_folders(resume)
    log.info("%d samples, %d steps per epoch, %s", len(drawn_from), steps, info)
    with signals.deferred():
        trainer.fit()
    best, last = trainer.files.best, trainer.files.last
    log.info("done: %s", best if best.is_file() else last)


def open_datasets(
    args: argparse.Namespace, tokenizer: Tokenizer
) -> tuple[ReferDataset | MixedDataset, ReferDataset]:
    """The training samples, and those of ``--val_split`` of the first dataset."""
    options = dataset_options(args)
    refer = REFER(**refer_options(args))
    val_set = ReferDataset(refer, args.val_split, tokenizer, **options)
    if "," not in args.dataset:
        return ReferDataset(refer, "train", tokenizer, **options), val_set
    from data.mixed import open_mixed

    mixed = open_mixed(parts(args), refer_options(args), tokenizer, options)
    args.mixed = mixed.counts
    for when, counts in mixed.counts.items():
        numbers = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        log.info("%s: %s %s leaving out images of other splits", args.dataset, numbers, when)
    return mixed, val_set


def choose_checkpoint(args: argparse.Namespace, info: DistInfo) -> tuple[str, list[str]]:
    """The checkpoint to resume, '' for a fresh run, and why newer ones cannot be; on all ranks."""
    auto = args.resume == "auto"
    path = "" if auto else args.resume
    reasons: list[str] = []
    if info.is_main and (auto or utils.restarts()):
        newest, reasons = StateFiles(args.output_dir, args.model_id).newest()
        path = str(newest or path)
    return utils.from_main((path, reasons))


def nothing_left(args: argparse.Namespace, content: dict[str, Any], resume: str) -> bool:
    """Whether a checkpoint is of a finished run, which ends this one before it writes anything.

    Raises:
        InputError: it is, and the user named it.
    """
    done = content.get("epoch", -1)
    if not isinstance(done, int) or done + 1 < args.epochs:
        return False
    line = f"{resume}: epoch {done + 1} of {args.epochs}: nothing left; --epochs N to go on, "
    line += "--init_from FILE to start anew from its weights"
    if args.resume != "auto" and not utils.restarts():
        raise InputError(line)
    log.info("%s", line)  # a scheduler may start a finished job again
    return True


def prepare_model(
    args: argparse.Namespace, info: DistInfo, content: dict[str, Any] | None, resume: str
) -> Segmenter:
    """The model on its device; says where its weights come from.

    Args:
        args, info: of the run.
        content, resume: of the checkpoint to resume and its path; None and '' for a fresh run.
    """
    utils.seed_everything(args.seed)
    model = build_model(args.model, **model_options(args))
    if content is not None:
        checkpoint.load_model(model, content, resume)
        log.info("weights: all of %s, which is resumed", resume)
    elif args.init_from:
        init_from(args, model)
    else:
        load_pretrained(args, model)
    model.to(info.device)
    if args.channels_last:
        runtime.use_channels_last(model)
    if args.grad_checkpoint:
        runtime.recompute_blocks(model)
    return model


def init_from(args: argparse.Namespace, model: Segmenter) -> None:
    """Load the weights of a trained model for a new run; says what differs.

    Raises:
        InputError: they do not fit, or the new run would rename the file.
    """
    files = StateFiles(args.output_dir, args.model_id)
    if Path(args.init_from).resolve() in [p.resolve() for p in (files.last, files.best)]:
        raise InputError(f"--init_from {args.init_from} is of this --model_id: give another one")
    weights = checkpoint.read_checkpoint(args.init_from)
    changed = checkpoint.load_model(model, weights, args.init_from, resize=True)
    log.info("weights: all of %s; a new run from epoch 0", args.init_from)
    if changed:
        others = f" and {len(changed) - 1} others" if changed[1:] else ""
        log.info("weights: but %s%s: resized, or not in the file", changed[0], others)
    for name, value in trained_with(model.trained_with, model.variant).items():
        if value != model.variant[name]:
            now = model.variant[name]
            log.info("--%s %s: the checkpoint was trained with %s", name, now, value)
    if args.pretrained_swin_weights:
        log.info("--pretrained_swin_weights is not used: --init_from has the backbone")


def load_pretrained(args: argparse.Namespace, model: Segmenter) -> None:
    """Load ImageNet Swin and BERT where asked; says which parts begin at random."""
    if args.pretrained_swin_weights:
        from lib.checkpoint.swin import load_swin_weights

        log.info("backbone: %s", load_swin_weights(model, args.pretrained_swin_weights))
    else:
        log.info(
            "backbone: random weights; published results begin with ImageNet's: give "
            "--pretrained_swin_weights"
        )
    if args.text_from_scratch:
        log.info("text encoder: random weights (--text_from_scratch)")
    else:
        model.load_text(load_bert(args.ck_bert))
        log.info("text encoder: BERT of %s", args.ck_bert)
    log.info("fusion and decoder: random weights, as published")


if __name__ == "__main__":
    utils.run_script(main)
