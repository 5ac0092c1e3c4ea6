"""The training run: its state, its loop, and what it writes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import utils
from bert import config_values
from data.dataset_refer_bert import ReferDataset
from data.loaders import RandomExpressionSampler, build_loader, one_expression_per_reference
from lib import checkpoint, runtime
from lib.errors import InputError
from lib.evaluation.evaluator import EvalConfig, evaluate
from lib.evaluation.metrics import Metrics
from lib.evaluation.protocol import tag
from lib.losses import WeightedLosses
from lib.model import Objective, Segmenter
from lib.training.optim import move_schedule
from lib.training.state_files import StateFiles, rename_existing
from lib.training.steps import Step, StepOptions, train_steps
from utils import DistInfo, Stopped, StopSignals, log

if TYPE_CHECKING:
    from data.mixed import MixedDataset
    from data.mosaic import MosaicDataset, MosaicSampler
    from lib.training.ema import WeightAverage
    from lib.training.maskris import MaskRIS


TENSORBOARD = "tensorboard"  # a folder
AVERAGE = "average"  # begins the names of the average's buffers


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains; the names are those of train.py's flags.

    Attributes:
        loss: weights of :data:`lib.losses.LOSSES`.
        protocol: label of the validation's protocol.
        save_steps, save_minutes: interval between saves within an epoch; 0 for none.
    """

    model_id: str
    output_dir: str
    epochs: int
    batch_size: int
    loss: Mapping[str, float]
    seed: int = 0
    workers: int = 0
    pin_mem: bool = False
    amp: str = "off"
    compile: bool = False
    accumulate: int = 1
    clip_grad: float = 0.0
    nonfinite: str = "stop"
    print_freq: int = 10
    eval_every: int = 1
    val_expressions: str = "one"
    protocol: str = "standard"
    no_target_pixels: int | str | None = None
    stop_after: int = 0
    save_steps: int = 0
    save_minutes: float = 0.0
    save_error: str = "stop"
    tensorboard: bool = False
    wandb: str | None = None


class Trainer:
    """Trains a model: steps, validations, log lines and state files.

    Attributes:
        epoch: number of finished epochs, validation included.
        step: number of steps done in the epoch after them.
        steps: number of steps of an epoch.
        best_oIoU: of the best validation so far, percent; -1 before the first. The first of
            :meth:`lib.evaluation.metrics.Metrics.headline`, which may be named cIoU.
        skipped: number of steps whose ``finite`` was False.

    Args:
        model: on its device, frozen parameters marked.
        optimizer, scheduler: of its parameters.
        train_set, val_set: samples.
        sampler: of ``train_set``, for this rank.
        config: how to train.
        arguments: the command line's, plain values; written into checkpoints and args.json.
        tokenizer: of :func:`bert.tokenizer_text`; a part of checkpoints, which need no other file.
        seen_images: ids, of this run and those before it.
        info: this process.
        signals: that may ask the run to stop.
        maskris: two passes over each batch, if given.
        average: of the weights, if given; it is what is evaluated, and a checkpoint's model.
    """

    def __init__(
        self,
        model: Segmenter,
        optimizer: torch.optim.AdamW,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        train_set: ReferDataset | MixedDataset | MosaicDataset,
        val_set: ReferDataset,
        sampler: RandomExpressionSampler | MosaicSampler,
        config: TrainConfig,
        arguments: dict[str, Any],
        tokenizer: str,
        seen_images: dict[str, Tensor],
        info: DistInfo,
        signals: StopSignals,
        maskris: MaskRIS | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.train_set, self.val_set, self.sampler = train_set, val_set, sampler
        self.config, self.arguments, self.info, self.signals = config, arguments, info, signals
        self.bert = {"config": config_values(model.text_config), "tokenizer": tokenizer}
        self.seen_images = seen_images
        self.scaler = torch.amp.GradScaler(info.device.type, enabled=config.amp == "fp16")
        self.steps = len(sampler) // config.accumulate
        self.loader = build_loader(train_set, sampler, config.workers, config.pin_mem)
        self.average = average
        self.evaluated = average.model if average else model
        self.maskris = maskris
        build = maskris.objective if maskris else Objective
        objective = build(model, WeightedLosses(config.loss))
        if config.compile:  # what validation calls, too
            runtime.compile_module(objective)
            runtime.compile_module(self.evaluated)
            runtime.compile_module(objective)
            runtime.compile_module(model)
        self.objective = utils.wrap_ddp(objective, info)
        self.files = StateFiles(config.output_dir, config.model_id)
        self.folder = Path("models") / config.model_id
        self.metrics_file = self.folder / "metrics.jsonl"
        self.board: Any = None  # with --tensorboard or --wandb
        # The training state in addition to model, optimizer, scheduler and scaler.
        self.epoch = self.step = self.skipped = 0
        self.best_oIoU = -1.0
        self.loss_sum, self.loss_count = 0.0, 0  # over the epoch's logged steps
        self.recent: list[Step] = []  # steps since the last log line
        self.rank_state: dict[str, Any] | None = None  # set when the resumed epoch starts
        self.saved_at = time.monotonic()
        self.unsaved = ""  # why the newest state is not on the disk

    # ---- loop ----

    def fit(self) -> None:
        """Train to the last epoch, or until ``stop_after`` or a signal ends the run.

        Raises:
            Stopped: a signal came; the state is saved.
            InputError: a state cannot be saved, or numbers are not finite, and that stops the run.
        """
        config = self.config
        stop = config.epochs
        if config.stop_after:
            stop = min(stop, self.epoch + config.stop_after)
        while self.epoch < stop:
            began = time.perf_counter()
            # A run that was stopped in its validation has averaged its buffers already.
            averaged = self.step == self.steps and self.rank_state is None
            self.train_epoch()
            if not averaged:
                for model in dict.fromkeys((self.model, self.evaluated)):
                    utils.average_buffers(model)
            due = (self.epoch + 1) % config.eval_every == 0 or self.epoch + 1 == config.epochs
            self.finish_epoch(self.validate() if due else None, time.perf_counter() - began)
            if self.epoch < stop and any(utils.any_rank(bool(self.signals.name))):
                if self.unsaved:
                    self.save([], required=True)
                raise Stopped(f"stopped by {self.signals.name or 'another process'}")
        if self.unsaved:
            raise InputError(
                f"trained to the end, but the newest state is not saved: {self.unsaved}"
            )

    def train_epoch(self) -> None:
        """Train the rest of the epoch, from ``step`` on."""
        config, device = self.config, self.info.device
        self.sampler.set_epoch(self.epoch, skip=self.step * config.accumulate)
        # Dropout and drop path depend on the epoch and rank alone, so a resumed run repeats them.
        utils.seed_everything(config.seed, self.epoch, self.info.rank)
        self._restore_rank_state()
        left = self.steps - self.step
        if not left:
            return
        options = StepOptions(
            *(config.amp, config.accumulate, config.clip_grad, config.nonfinite == "skip"),
            self.maskris,
        )
        steps = train_steps(
            self.objective,
            self.loader,
            self.optimizer,
            self.scheduler,
            device,
            options,
            self.scaler,
        )
        began = time.perf_counter()
        bar = utils.progress(steps, f"epoch {self.epoch}", self.info.rank, left)
        for done, step in enumerate(bar, 1):
            self.step += 1
            if self.average:
                self.average.update(self.model, self.epoch * self.steps + self.step)
            self.recent.append(step)
            log_now = self.step % config.print_freq == 0 or self.step == self.steps
            if device.type != "cuda":
                self.check_finite([step])
            elif log_now:  # reading a number waits for the GPU
                self.check_finite(self.recent)
            if log_now:
                self.log_steps((time.perf_counter() - began) / done)
            self.save_if_due()

    def validate(self) -> Metrics:
        """Metrics of the validation split.

        An error in it, such as an image that cannot be read, loses nothing either: the state
        before the validation is saved.

        Raises:
            Stopped: a signal came.
        """
        config = self.config
        if config.val_expressions == "one":
            samples = self.val_set.samples_of_ref
            indices = one_expression_per_reference(samples, config.seed, self.epoch)
        else:
            indices = list(range(len(self.val_set)))
        how = EvalConfig(
            *(config.batch_size, config.workers, config.pin_mem, config.amp),
            no_target_pixels=config.no_target_pixels,
            compile=config.compile,
        )
        try:
            with self.signals.at_once():
                return evaluate(self.evaluated, self.val_set, indices, how, self.info).summarise()
        except Stopped as e:
            if self.info.is_main:
                self.save([], required=True)
            raise Stopped(f"{e} in validation; saved: {self.files.last}") from None
        except Exception:
            with contextlib.suppress(InputError):  # the first error is the one to tell
                self.save([])
            raise

    def finish_epoch(self, metrics: Metrics | None, seconds: float) -> None:
        """Finish the epoch: append its record, save the state, update the best oIoU.

        Args:
            metrics: of the epoch's validation; None without one.
            seconds: that the epoch took.
        """
        epoch, protocol = self.epoch, self.config.protocol
        loss = self.loss_sum / self.loss_count if self.loss_count else math.nan
        record = {"kind": "epoch", "epoch": epoch, "step": (epoch + 1) * self.steps}
        record |= {"loss": loss, "seconds": round(seconds, 2)}
        record |= {"peak_memory_gb": round(utils.peak_memory_gb(self.info.device), 3)}
        best = metrics is not None and metrics.oIoU > self.best_oIoU
        if metrics is not None:
            numbers = "  ".join(f"{k} {v:.2f}" for k, v in metrics.headline().items())
            log.info("epoch %d  %s%s", epoch, numbers, tag(protocol))
            record |= {"val": metrics.as_dict(), "protocol": protocol}
            self.best_oIoU = metrics.oIoU if best else self.best_oIoU
        self.record(record)
        if self.board is not None and metrics is not None:
            self.board.show(self.evaluated, self.val_set, record["step"])
        self.epoch, self.step, self.loss_sum, self.loss_count = epoch + 1, 0, 0.0, 0
        self.save([], best=best)
        if best and metrics is not None:
            name = next(iter(metrics.headline()))
            log.info("best so far: %s %.2f%s", name, self.best_oIoU, tag(protocol))
        utils.barrier()

    # ---- state ----

    def state_dict(self, rank_states: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of a checkpoint: the published layout, and what a resumed run needs beyond.

        A file's ``epoch`` is the index, from 0, of the last finished epoch, as published.

        Args:
            rank_states: :meth:`get_rank_state` of every rank; [] if all have the same.
        """
        recent = [step for step in self.recent if step.finite]
        progress = {
            "steps": self.steps,
            "world": self.info.world,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "skipped": self.skipped,
            "recent": [[s.loss.item(), s.lr, s.grad_norm.item()] for s in recent],
            "recent_losses": [{k: v.item() for k, v in s.losses.items()} for s in recent],
            "shares": rank_states,  # a key that all versions read
        }
        return {
            **self.evaluated.to_published(),
            **({"raw_model": self.model.state_dict()} if self.average else {}),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch - 1,
            "best_oIoU": self.best_oIoU,
            "args": self.arguments,
            "bert": self.bert,
            "seen_images": self.seen_images,
            "progress": progress,
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def load_state_dict(self, content: dict[str, Any], path: str) -> None:
        """Resume from a checkpoint whose weights are in the model already.

        Raises:
            InputError: it holds no training state or a damaged one, or was saved within an epoch
                that was divided among other ranks or batches.
        """
        if "raw_model" in content:
            from lib.training.ema import load_raw_weights

            load_raw_weights(self.model, content, path)
        training = (self.optimizer, self.scheduler, self.scaler)
        checkpoint.load_training(content, path, *training)
        self.epoch = content["epoch"] + 1
        counted = self.scheduler.last_epoch
        self.best_oIoU = content.get("best_oIoU", -1.0)  # the release does not store it
        try:
            self._load_progress(content.get("progress", {}))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise InputError(f"{path}: 'progress' is damaged ({reason}): resume another one") from e
        # Steps may have another size now: the schedule depends on the part of training done.
        move_schedule(self.scheduler, self.epoch * self.steps + self.step)
        if changes := self._changed_steps(content.get("progress", {}), counted):
            lr = self.optimizer.param_groups[0]["lr"]
            part = f"{self.epoch} of {self.config.epochs} epochs"
            log.info("other steps than before: %s; goes on after %s, lr %.3g", changes, part, lr)

    def _changed_steps(self, saved: dict[str, Any], counted: int = 0) -> str:
        """What differs from the run that is resumed in how training is divided into steps.

        Args:
            saved: ``progress`` of the checkpoint, {} of a published one.
            counted: steps of its scheduler.
        """
        before = dict(self.model.trained_with) | {"processes": saved.get("world")}
        before["steps per epoch"] = saved.get("steps", counted // max(1, self.epoch))
        now = self.arguments | {"processes": self.info.world, "steps per epoch": self.steps}
        names = ("steps per epoch", "processes", "batch_size", "accumulate")
        return ", ".join(
            f"{name} {before[name]} -> {now[name]}"
            for name in names
            if before.get(name) is not None and before[name] != now.get(name)
        )

    def _load_progress(self, saved: dict[str, Any]) -> None:
        self.skipped = saved.get("skipped", 0)
        if not saved.get("step"):
            return
        if changes := self._changed_steps(saved):
            raise InputError(
                f"--resume: saved within an epoch, and now differ {changes}: "
                "give the same processes, --batch_size, --accumulate and data"
            )
        self.step = saved["step"]
        self.loss_sum, self.loss_count = saved["loss_sum"], saved["loss_count"]
        by_name = saved.get("recent_losses") or [{} for _ in saved["recent"]]
        self.recent = [
            Step(
                self._scalar(loss),
                {name: self._scalar(value) for name, value in losses.items()},
                lr,
                self._scalar(norm),
                torch.tensor(True),
                [],
            )
            for (loss, lr, norm), losses in zip(saved["recent"], by_name, strict=True)
        ]
        rank_states = saved["shares"]
        if not rank_states:
            return
        state = rank_states[self.info.rank]
        for name, buffer in self._buffers().items():
            if name.startswith(AVERAGE) and name not in state["buffers"]:
                continue  # --model_ema is new: the average begins with the statistics so far
            if state["buffers"][name].shape != buffer.shape:
                raise ValueError(f"shape of {name}")
        generator, own = state["rng"][0], torch.get_rng_state()
        if (generator.shape, generator.dtype) != (own.shape, own.dtype):
            raise ValueError("state of the random generator")
        self.rank_state = state

    def get_rank_state(self) -> dict[str, Any]:
        """The part of the state that differs between ranks within an epoch."""
        buffers = {name: buffer.cpu() for name, buffer in self._buffers().items()}
        return {"rng": utils.rng_state(self.info.device), "buffers": buffers}

    def _restore_rank_state(self) -> None:
        """Set what :meth:`load_state_dict` read; DDP gave all ranks the buffers of rank 0."""
        if self.rank_state is None:
            return
        for name, buffer in self._buffers().items():
            if name in self.rank_state["buffers"]:
                buffer.copy_(self.rank_state["buffers"][name])
        utils.set_rng_state(self.rank_state["rng"], self.info.device)
        self.rank_state = None

    def _buffers(self) -> dict[str, Tensor]:
        """Batch norm statistics, which differ between ranks on a CPU within an epoch."""
        averaged = self.average.model.named_buffers(AVERAGE) if self.average else ()
        named = (*self.model.named_buffers(), *averaged)
        return {n: b for n, b in named if b.is_floating_point()}

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.info.device)

    # ---- files ----

    def prepare_folders(self, resume: str) -> None:
        """Rename the files of an earlier run of this name; drop lines that will be written again.

        Args:
            resume: the checkpoint that is resumed, '' for a fresh run.
        """
        restarted = utils.restarts()
        utils.make_folder(Path(self.config.output_dir))
        done = self.epoch * self.steps + self.step
        if resume:
            utils.trim_jsonl(
                self.metrics_file,
                lambda r: r["epoch"] < self.epoch or (r["kind"] == "step" and r["step"] <= done),
            )
        else:
            for path in (self.metrics_file, self.folder / TENSORBOARD):
                if path.exists():
                    rename_existing(path)
        if not restarted and (self.arguments["resume"] != "auto" or not resume):
            for path in self.files.rename_existing(keep=resume):
                log.info("the checkpoint of an earlier run is now %s", path)
        if self.config.tensorboard or self.config.wandb is not None:
            from lib.training.tracking import open_trackers

            self.board = open_trackers(self, done, resumed=bool(resume))
        content = self.arguments | {"environment": utils.environment()}
        utils.write_json(content, self.folder / "args.json")

    def save_if_due(self) -> None:
        """After a step: save at the interval or on a signal, and stop on a signal.

        Raises:
            Stopped: after saving.
        """
        config = self.config
        minutes = (time.monotonic() - self.saved_at) / 60
        overdue = bool(config.save_minutes) and minutes > config.save_minutes
        save, stop = utils.any_rank(overdue and self.info.is_main, bool(self.signals.name))
        if save or stop or (config.save_steps and self.step % config.save_steps == 0):
            self.save(utils.gather(self.get_rank_state()), required=stop)
        if stop:
            utils.barrier()  # torchrun ends all processes with the first
            who = self.signals.name or "another process"
            raise Stopped(f"stopped by {who}, {self.where()}; saved: {self.files.last}")

    def save(
        self, rank_states: list[dict[str, Any]], *, best: bool = False, required: bool = False
    ) -> None:
        """Write the state on rank 0.

        Args:
            rank_states: of all ranks; [] between epochs.
            best: write it as the best so far, too.
            required: an error stops the run, whatever ``save_error`` says.

        Raises:
            InputError: it cannot be written, and that stops the run.
        """
        self.saved_at = time.monotonic()
        if not self.info.is_main:
            return
        try:
            self.files.save(self.state_dict(rank_states), best=best)
            self.unsaved = ""
        except InputError as e:
            self._handle_write_error(e, required)

    def record(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and its numbers to what tracks the run."""
        if not self.info.is_main:
            return
        try:
            utils.append_jsonl(record, self.metrics_file)
        except InputError as e:
            self._handle_write_error(e)
        if self.board is not None:
            self.board.add(record)

    def _handle_write_error(self, error: InputError, required: bool = False) -> None:
        if required or self.config.save_error == "stop":
            raise error
        self.unsaved = str(error)
        log.warning("not saved, but training is not stopped: %s", error)

    # ---- numbers ----

    def where(self) -> str:
        """The step that was made last, in words."""
        return f"epoch {self.epoch} step {self.step}/{self.steps}"

    def log_steps(self, pace: float) -> None:
        """Log this rank's mean losses over the steps since the last line.

        Args:
            pace: mean seconds per step since this process began the epoch.
        """
        good, last = [step for step in self.recent if step.finite], self.recent[-1]
        loss = torch.stack([step.loss for step in good]).mean().item() if good else math.nan
        names = good[-1].losses if good else {}
        losses = {
            name: torch.stack([s.losses[name] for s in good if name in s.losses]).mean().item()
            for name in names
        }
        self.loss_sum += loss * len(good) if good else 0.0
        self.loss_count += len(good)
        self.recent.clear()
        parts = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        shown = f"  ({parts})" if parts else ""
        log.info("%s  loss %.4f%s  lr %.3g  %.3f s/step", self.where(), loss, shown, last.lr, pace)
        record = {"kind": "step", "epoch": self.epoch, "step": self.epoch * self.steps + self.step}
        record |= {"loss": loss, "losses": losses, "lr": last.lr}
        record |= {"grad_norm": last.grad_norm.item(), "seconds_per_step": round(pace, 4)}
        self.record(record | ({"skipped": self.skipped} if self.skipped else {}))

    def check_finite(self, steps: list[Step]) -> None:
        """Report the last steps if their loss or gradients were not finite.

        Raises:
            InputError: a step was not finite, and ``nonfinite`` is 'stop'.
        """
        for number, step in enumerate(steps, self.step - len(steps) + 1):
            if not step.finite:
                self._report_nonfinite(step, number)

    def _report_nonfinite(self, step: Step, number: int) -> None:
        self.skipped += 1
        stop = self.config.nonfinite == "stop"
        loss, norm = step.loss.item(), step.grad_norm.item()
        ranks = utils.gather((math.isfinite(loss), self.train_set.name_samples(step.indices)))
        if not self.info.is_main:
            if stop:
                raise InputError("stopped: numbers are not finite, see the message of process 0")
            return
        # If the loss of every rank is finite, the gradients are not: any sample may be the cause.
        bad = [names for finite, names in ranks if not finite] or [names for _, names in ranks]
        samples = [name for names in bad for name in names]
        what = f"loss {loss:.4g}, gradient norm {norm:.4g} at epoch {self.epoch} "
        what += f"step {number}/{self.steps}; samples: {', '.join(samples)}"
        if self.skipped == 1:
            facts = {"step": number, "loss": loss, "grad_norm": norm, "samples": samples}
            content = self.state_dict([]) | {"nonfinite": facts}
            try:
                checkpoint.write_checkpoint(content, self.files.nonfinite)
                what += f"; the state when it was noticed: {self.files.nonfinite}"
            except InputError as e:
                what += f"; {e}"
        if stop:
            raise InputError(f"{what}: lower --lr, try --clip_grad 1, or --nonfinite skip")
        log.warning("step skipped: %s", what)
