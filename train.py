"""Train: parse, build, and for each epoch train, validate, save.

python train.py --dataset refcoco --model_id refcoco ...
torchrun --nproc_per_node 4 train.py ...
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from args import (
    compare_args,
    dataset_options,
    model_options,
    parse_train,
    protocol_of,
    refer_options,
)
from bert import load_bert, load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import (
    RandomExpressionSampler,
    build_loader,
    one_expression_per_object,
)
from lib import checkpoint, runtime
from lib.checkpoint.swin import load_swin_weights
from lib.errors import InputError
from lib.evaluation.metrics import Metrics, summarise
from lib.evaluation.protocol import tag
from lib.losses import LOSSES
from lib.model import Objective
from lib.segmentation import build_model
from lib.training import optim
from lib.training.state import Run
from lib.training.state_files import StateFiles, set_aside
from lib.training.steps import Step, StepOptions, train_steps
from refer.refer import REFER
from test import count
from utils import DistInfo, Stopped, StopSignals, Votes, log


def build(
    args: argparse.Namespace, info: DistInfo, steps_per_epoch: int, resume: str = ""
) -> tuple[Run, dict[str, Any] | None]:
    """Model, optimizer and schedule; fresh, or continued from the checkpoint ``resume``.

    Returns:
        The run, and what is this process' own if it continues within an epoch.
    """
    content = checkpoint.read_file(resume) if resume else None
    utils.seed_everything(args.seed)
    model = build_model(args.model, **model_options(args))
    if content is not None:
        checkpoint.load_model(model, content, resume)
    else:
        if not args.text_from_scratch:
            model.load_text(load_bert(args.ck_bert))
        if args.pretrained_swin_weights:
            log.info(load_swin_weights(model, args.pretrained_swin_weights))
    model.to(info.device)
    if args.channels_last:
        runtime.use_channels_last(model)
    if args.grad_checkpoint:
        runtime.recompute_blocks(model)
    groups = optim.parameter_groups(model, args.weight_decay, args.lang_layers, args.norm_decay)
    optim.freeze_unused(model, groups)
    total_batch = info.world * args.batch_size * args.accumulate
    lr = optim.scaled_lr(args.lr, total_batch, args.scale_lr)
    optimizer = optim.build_optimizer(
        groups, lr, args.weight_decay, args.amsgrad, fused=args.fused_adamw == "on"
    )
    scheduler = optim.poly_schedule(optimizer, steps_per_epoch * args.epochs)
    scaler = torch.amp.GradScaler(info.device.type, enabled=args.amp == "fp16")
    run = Run(model, optimizer, scheduler, scaler)
    if content is None:
        return run, None
    checkpoint.load_training(content, resume, optimizer, scheduler, scaler)
    run.epoch = content["epoch"]
    run.best_oIoU = content.get("best_oIoU", -1.0)  # the release does not store it
    share = run.restore(content.get("progress", {}), steps_per_epoch, info.rank, info.world)
    for difference in compare_args(content.get("args"), args):
        log.warning("the run that is continued had %s", difference)
    return run, share


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


class Trainer:
    """One training run: its steps, validations, log lines and state files.

    Args:
        run: where it stands; continued from there.
        share: of :func:`build`.
        train_set, val_set: samples.
        sampler: of ``train_set``, this process' share.
        files: where states go.
        args: of :func:`args.parse_train`.
        info: this process.
        signals: that may ask to stop.
    """

    def __init__(
        self,
        run: Run,
        share: dict[str, Any] | None,
        train_set: ReferDataset,
        val_set: ReferDataset,
        sampler: RandomExpressionSampler,
        files: StateFiles,
        args: argparse.Namespace,
        info: DistInfo,
        signals: StopSignals,
    ) -> None:
        self.run, self.share, self.args, self.info, self.signals = run, share, args, info, signals
        self.train_set, self.val_set, self.sampler, self.files = train_set, val_set, sampler, files
        self.steps = len(sampler) // args.accumulate  # an epoch
        self.loader = build_loader(train_set, sampler, args.workers, args.pin_mem)
        objective = Objective(run.model, LOSSES[args.loss])
        if args.compile:
            runtime.compile_module(objective)
        self.objective = wrap(objective, info)
        self.protocol = protocol_of(args).label  # of the validation
        self.folder = Path("models") / args.model_id
        self.metrics_file = self.folder / "metrics.jsonl"
        self.board: Any = None  # TensorBoard's writer
        self.votes = Votes(info, 2)  # to save, to stop
        self.saved_at = time.monotonic()
        self.unsaved = ""  # why the newest state is not on the disk

    # ---- the road ----

    def fit(self) -> None:
        """Train to the end, or to where ``--stop_after`` or a signal says."""
        run, args = self.run, self.args
        stop = min(args.epochs, run.epoch + 1 + args.stop_after) if args.stop_after else args.epochs
        while run.epoch + 1 < stop:
            began = time.perf_counter()
            averaged = run.step == self.steps and self.share is None  # stopped while it validated
            self.train_epoch()
            if not averaged:
                utils.average_buffers(run.model)
            last = run.epoch + 2 == args.epochs
            metrics = self.validate() if last or (run.epoch + 2) % args.eval_every == 0 else None
            self.finish_epoch(metrics, time.perf_counter() - began)
            if any(self.votes.now(False, bool(self.signals.name))):
                raise Stopped(f"stopped by {self.signals.name or 'another process'}")
        if self.unsaved:
            raise InputError(
                f"trained to the end, but the newest state is not saved: {self.unsaved}"
            )

    def train_epoch(self) -> None:
        """The rest of the epoch from ``run.step`` on."""
        run, args, epoch = self.run, self.args, self.run.epoch + 1
        self.sampler.set_epoch(epoch, skip=run.step * args.accumulate)
        # Dropout and drop path depend on the moment alone, so that a resumed run draws the same.
        utils.seed_everything(args.seed, epoch, self.info.rank)
        if self.share is not None:
            utils.set_rng_state(run.take(self.share), self.info.device)
            self.share = None
        left = self.steps - run.step
        if not left:
            return
        options = StepOptions(
            args.amp, args.accumulate, args.clip_grad, spare_buffers=args.nonfinite == "skip"
        )
        steps = train_steps(
            self.objective,
            self.loader,
            run.optimizer,
            run.scheduler,
            self.info.device,
            options,
            run.scaler,
            utils.all_true,
        )
        began = time.perf_counter()
        for i, step in enumerate(utils.progress(steps, f"epoch {epoch}", self.info.rank, left)):
            run.step += 1
            run.recent.append(step)
            if not self.checks_late():
                self.check(step, run.step)
            if run.step % args.print_freq == 0 or run.step == self.steps:
                self.log_steps((time.perf_counter() - began) / (i + 1))
            self.save_if_due()

    def save_if_due(self) -> None:
        """After a step: save by ``--save-every`` or by request, and stop by request.

        Raises:
            Stopped: after saving.
        """
        args, minutes = self.args, self.args.save_minutes
        overdue = bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes
        save, stop = self.votes.cast(overdue and self.info.is_main, bool(self.signals.name))
        if save or stop or (args.save_steps and self.run.step % args.save_steps == 0):
            shares = utils.gather(self.run.share(utils.rng_state(self.info.device)))
            self.save(shares, must=stop)
        if stop:
            utils.barrier()  # torchrun ends all processes with the first
            who = self.signals.name or "another process"
            raise Stopped(f"stopped by {who}, {self.where()}; saved: {self.files.last}")

    def validate(self) -> Metrics:
        """Metrics of the validation split, each process evaluating its share.

        Raises:
            Stopped: a signal came; the trained epoch is saved, and only the validation lost.
        """
        run, args = self.run, self.args
        epoch = run.epoch + 1
        if args.val_expressions == "one":
            indices = one_expression_per_object(self.val_set.samples_of_ref, args.seed, epoch)
        else:
            indices = list(range(len(self.val_set)))
        try:
            with self.signals.at_once():
                return summarise(*count(run.model, self.val_set, indices, args, self.info))
        except Stopped as e:
            if self.info.is_main:
                self.save([], must=True)
            raise Stopped(f"{e} in validation; saved: {self.files.last}") from None

    def finish_epoch(self, metrics: Metrics | None, seconds: float) -> None:
        """Write the epoch's line and state; metrics are None where it was not validated."""
        run = self.run
        run.epoch += 1
        better = metrics is not None and metrics.oIoU > run.best_oIoU
        if metrics is not None:
            numbers = (run.epoch, metrics.oIoU, metrics.mIoU)
            log.info("epoch %d  oIoU %.2f  mIoU %.2f%s", *numbers, tag(self.protocol))
        if better and metrics is not None:
            run.best_oIoU = metrics.oIoU
        loss = run.loss_sum / run.loss_count if run.loss_count else float("nan")
        record = {"kind": "epoch", "epoch": run.epoch, "step": (run.epoch + 1) * self.steps}
        record |= {"loss": loss, "seconds": round(seconds, 2)}
        record |= {"peak_memory_gb": round(utils.peak_memory_gb(self.info.device), 3)}
        if metrics is not None:
            record |= {"val": metrics.as_dict(), "protocol": self.protocol}
        self.record(record)
        run.step, run.loss_sum, run.loss_count = 0, 0.0, 0
        self.save([], best=better)
        if better:
            log.info("better than before: oIoU %.2f%s", run.best_oIoU, tag(self.protocol))
        utils.barrier()

    # ---- states ----

    def save(self, shares: list[dict[str, Any]], *, best: bool = False, must: bool = False) -> None:
        """Write the state; what to do where that fails is ``--save_error``'s, or ``must``.

        Args:
            shares: what is each process' own; [] between epochs.
            best: it is the best so far, too.
            must: no state, no use in going on.

        Raises:
            InputError: it cannot be written, and that is to stop the run.
        """
        self.saved_at = time.monotonic()
        if not self.info.is_main:
            return
        try:
            self.files.save(self.content(shares), best=best)
            self.unsaved = ""
        except InputError as e:
            self.failed_to_write(e, must)

    def content(self, shares: list[dict[str, Any]]) -> dict[str, Any]:
        """The checkpoint of this moment."""
        progress = self.run.progress(self.steps, shares, self.info.world)
        return self.run.content(vars(self.args), progress)

    def record(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics, and to TensorBoard's."""
        if not self.info.is_main:
            return
        try:
            utils.append_jsonl(record, self.metrics_file)
        except InputError as e:
            self.failed_to_write(e)
        if self.board is not None:
            utils.add_scalars(self.board, record)

    def failed_to_write(self, error: InputError, must: bool = False) -> None:
        """Stop, or go on without."""
        if must or self.args.save_error == "stop":
            raise error
        self.unsaved = str(error)
        log.warning("training goes on unsaved: %s", error)

    # ---- numbers ----

    def where(self) -> str:
        """The step that was made last."""
        return f"epoch {self.run.epoch + 1} step {self.run.step}/{self.steps}"

    def checks_late(self) -> bool:
        """Whether steps are looked at when they are logged, so as not to wait for the GPU."""
        groups = self.run.optimizer.param_groups
        return self.info.device.type == "cuda" and all(g.get("fused") for g in groups)

    def log_steps(self, pace: float) -> None:
        """One line of the steps since the last one, ``pace`` seconds each."""
        run = self.run
        if self.checks_late():
            for number, step in enumerate(run.recent, run.step - len(run.recent) + 1):
                self.check(step, number)
        good = [step.loss for step in run.recent if step.finite]
        mean = torch.stack(good).mean().item() if good else float("nan")
        last = run.recent[-1]
        run.loss_sum += mean * len(good) if good else 0.0
        run.loss_count += len(good)
        run.recent.clear()
        log.info("%s  loss %.4f  lr %.3g  %.3f s/step", self.where(), mean, last.lr, pace)
        record = {"kind": "step", "epoch": run.epoch + 1}
        record |= {"step": (run.epoch + 1) * self.steps + run.step, "loss": mean, "lr": last.lr}
        record |= {"grad_norm": last.grad_norm.item(), "seconds_per_step": round(pace, 4)}
        if run.skipped:
            record |= {"skipped": run.skipped}
        self.record(record)

    def check(self, step: Step, number: int) -> None:
        """Report a step whose loss or gradients were not finite; its update was not made.

        Args:
            step: of this process.
            number: of the step in the epoch, from 1.

        Raises:
            InputError: ``--nonfinite stop``.
        """
        if step.finite:
            return
        self.run.skipped += 1
        loss, norm = step.loss.item(), step.grad_norm.item()
        names = self.train_set.name_samples(step.indices)
        shares = utils.gather((math.isfinite(loss), names))
        # Where every process' loss is finite, the gradients are not, and any sample may be why.
        bad = [share for share in shares if not share[0]] or shares
        samples = [name for _, names in bad for name in names]
        stop = self.args.nonfinite == "stop"
        if self.info.is_main:
            what = f"loss {loss:.4g}, gradient norm {norm:.4g} at epoch {self.run.epoch + 1} "
            what += f"step {number}/{self.steps}; samples: {', '.join(samples)}"
            if self.run.skipped == 1:
                facts = {"step": number, "loss": loss, "grad_norm": norm, "samples": samples}
                checkpoint.write_file(self.content([]) | {"nonfinite": facts}, self.files.nonfinite)
                what += f"; the state before it: {self.files.nonfinite}"
            if stop:
                raise InputError(f"{what}: lower --lr, try --clip_grad 1, or --nonfinite skip")
            log.warning("step skipped: %s", what)
        elif stop:
            raise InputError("stopped for the numbers that process 0 tells of")


def start(args: argparse.Namespace, files: StateFiles, info: DistInfo) -> str:
    """The checkpoint to continue from, '' for a fresh run: one answer for all processes."""
    auto = args.resume == "auto"
    path = "" if auto else args.resume
    if info.is_main and (auto or utils.restarts()):
        newest, complaints = files.newest()
        for complaint in complaints:
            log.warning("not continued from: %s", complaint)
        path = str(newest or path)
    path = utils.from_main(path)
    if auto or utils.restarts():
        log.info(f"continuing from {path}" if path else "starting fresh")
    return path


def prepare_folders(trainer: Trainer, resume: str) -> None:
    """Set aside what an earlier run of the name left, or what this one will write again."""
    args, run, file = trainer.args, trainer.run, trainer.metrics_file
    utils.make_folder(Path(args.output_dir))
    done = (run.epoch + 1) * trainer.steps + run.step
    if resume:
        utils.trim_jsonl(file, lambda r: r["epoch"] <= run.epoch or _before(r, done))
    elif file.is_file():
        set_aside(file)
    if not utils.restarts() and (args.resume != "auto" or not resume):
        for aside in trainer.files.set_aside(keep=resume):
            log.info("an earlier run's state is now %s", aside)
    utils.write_json(
        vars(args) | {"environment": utils.environment()}, trainer.folder / "args.json"
    )
    if args.tensorboard:
        trainer.board = utils.open_board(trainer.folder / "tensorboard", done)


def _before(record: dict[str, Any], step: int) -> bool:
    return record["kind"] == "step" and record["step"] <= step


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_train(argv)
    with StopSignals() as signals:
        train(args, signals)


def train(args: argparse.Namespace, signals: StopSignals) -> None:
    """Build everything, and train.

    Raises:
        Stopped: a signal came; what could be saved was.
    """
    if args.tf32:
        runtime.allow_tf32()
    if args.deterministic:
        utils.make_deterministic()
    info = utils.init_distributed(args.device, args.local_rank)
    tokenizer = load_tokenizer(args.bert_tokenizer)
    refer = REFER(**refer_options(args))
    train_set, val_set = (
        ReferDataset(refer, split, tokenizer, **dataset_options(args))
        for split in ("train", args.val_split)
    )
    for dataset in (train_set, val_set):
        dataset.check_images()
    sampler = RandomExpressionSampler(
        train_set.samples_of_ref, args.batch_size, args.seed, info.rank, info.world, args.accumulate
    )
    utils.setup_logging(Path("models") / args.model_id, info.rank)
    files = StateFiles(args.output_dir, args.model_id)
    resume = start(args, files, info)
    run, share = build(args, info, len(sampler) // args.accumulate, resume)
    # A first step that is not made, for its numbers, is reported elsewhere.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    trainer = Trainer(run, share, train_set, val_set, sampler, files, args, info, signals)
    if info.is_main:
        prepare_folders(trainer, resume)
    objects = len(train_set.samples_of_ref)
    log.info("%d objects, %d steps an epoch, %s", objects, trainer.steps, info)
    with signals.deferred():
        trainer.fit()
    log.info("done: %s", files.best)


if __name__ == "__main__":
    utils.run_script(main)
