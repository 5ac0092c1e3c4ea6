"""Draw the training curves of one or several runs.

    python -m tools.curves models/A [models/B ...] --output curves.png

A run is a folder with the `metrics.jsonl` of train.py, or such a file. Loss, learning rate and
validation IoU stand over the training step. Needs matplotlib: pip install -r requirements-tools.txt
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import utils
from args import Parser
from lib.errors import InputError

COLORS = ("#e90080", "#008ce6", "#f29100", "#2a9d4a", "#7a4fd0", "#8c6239")
NAN = float("nan")


@dataclass
class Curve:
    """A quantity over training steps; nan if it was not finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: Any) -> None:
        """Append a point, after dropping points of this and later steps: a resumed run repeats
        the steps after its checkpoint."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(float(value) if isinstance(value, int | float) else NAN)


@dataclass
class Run:
    """The metrics.jsonl of a run.

    Attributes:
        name: for the legend.
        loss, lr: per logged step.
        epoch_loss: mean of each epoch.
        oIoU, mIoU: validation, percent; empty without validation.
        unreadable: number of ignored lines, such as one that a killed run was writing.
    """

    name: str
    loss: Curve = field(default_factory=Curve)
    lr: Curve = field(default_factory=Curve)
    epoch_loss: Curve = field(default_factory=Curve)
    oIoU: Curve = field(default_factory=Curve)
    mIoU: Curve = field(default_factory=Curve)
    unreadable: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            KeyError: a field is missing.
        """
        step = int(record["step"])
        if record["kind"] == "step":
            self.loss.add(step, record["loss"])
            self.lr.add(step, record["lr"])
        elif record["kind"] == "epoch":
            self.epoch_loss.add(step, record["loss"])
            if record.get("val") is not None:
                val = record["val"]
                # As gRefCOCO's are named.
                self.oIoU.add(step, val["cIoU" if "cIoU" in val else "oIoU"])
                self.mIoU.add(step, val["gIoU" if "gIoU" in val else "mIoU"])


def read_run(path: Path, name: str) -> Run:
    """Read a run's metrics.jsonl.

    Args:
        path: the file or its folder.
        name: for the legend.

    Raises:
        InputError: it is missing, or no line of it is usable.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError as e:
        raise InputError(f"{file} does not exist: give the folder of a run, models/<id>") from e
    except OSError as e:
        raise InputError(f"{file} cannot be read: {e.strerror}") from e
    run = Run(name)
    for line in filter(str.strip, lines):
        try:
            run.add(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            run.unreadable += 1
    if not (run.loss.steps or run.epoch_loss.steps):
        raise InputError(f"{file} holds no step or epoch of a training run")
    return run


def names(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the folder's, or its whole path."""
    short = [(p if p.is_dir() else p.parent).resolve().name for p in paths]
    return [n if short.count(n) == 1 else str(p) for n, p in zip(short, paths, strict=True)]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the runs' curves into an image.

    Args:
        runs: one or more.
        path: its ending chooses the format: .png, .pdf, .svg.

    Raises:
        InputError: matplotlib is not installed, or the image cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")  # no display is needed
        from matplotlib import pyplot as plt
    except ImportError as e:
        raise InputError("curves need matplotlib: pip install -r requirements-tools.txt") from e
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained", sharex=True)
    for run, color in zip(runs, (COLORS[i % len(COLORS)] for i in range(len(runs))), strict=True):
        _draw_loss(axes[0], run, color)
        # Dashed over the first: runs often share a schedule, and would hide each other.
        axes[1].plot(run.lr.steps, run.lr.values, "-" if run is runs[0] else "--", color=color)
        _draw_iou(axes[2], run, color)
    for axis, title in zip(axes, ("loss", "learning rate", "validation IoU, %"), strict=True):
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axes[1].yaxis.set_major_formatter("{x:.2g}")
    if any(run.oIoU.steps for run in runs):
        axes[2].legend(frameon=False, loc="lower right")
    else:
        axes[2].text(0.5, 0.5, "no validation yet", ha="center", transform=axes[2].transAxes)
    if len(runs) > 1:
        axes[0].legend(frameon=False)
    else:
        figure.suptitle(runs[0].name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as e:
        raise InputError(f"cannot write {path} ({e.strerror}): change --output") from e
    except ValueError as e:  # an ending that matplotlib does not know
        raise InputError(f"--output {path}: give a name ending in .png, .pdf or .svg") from e
    finally:
        plt.close(figure)


def _draw_loss(axis: Any, run: Run, color: str) -> None:
    """Logged steps faintly, smoothed steps clearly."""
    axis.plot(run.loss.steps, run.loss.values, color=color, alpha=0.3, linewidth=1)
    smooth = run.loss if run.loss.steps else run.epoch_loss
    values = smoothed(smooth.values) if run.loss.steps else smooth.values
    axis.plot(smooth.steps, values, color=color, linewidth=2, label=run.name)


def _draw_iou(axis: Any, run: Run, color: str) -> None:
    if not run.oIoU.steps:
        return
    best = max((v for v in run.oIoU.values if math.isfinite(v)), default=NAN)
    axis.plot(
        run.oIoU.steps,
        run.oIoU.values,
        "o-",
        color=color,
        markersize=3,
        label=f"{run.name} oIoU (best {best:.1f})",
    )
    axis.plot(
        run.mIoU.steps,
        run.mIoU.values,
        "o--",
        color=color,
        markersize=3,
        alpha=0.6,
        label=f"{run.name} mIoU",
    )


def smoothed(values: Sequence[float], span: int = 0) -> list[float]:
    """Exponential moving mean without the start's bias; it passes over nan.

    Args:
        values: of a curve.
        span: about how many points it averages; 0: a twentieth of all.

    Returns:
        As many values; nan where the value was.
    """
    decay = 1 - 1 / max(1, span or len(values) / 20)
    total = weight = 0.0
    out = []
    for value in values:
        if not math.isfinite(value):
            out.append(NAN)
            continue
        total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs of the command line."""
    p = Parser("python -m tools.curves", description="Draw training curves.")
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs, models/<id>")
    p.add_argument("--output", type=Path, default=Path("curves.png"))
    args = p.parse_args(argv)
    runs = [read_run(path, name) for path, name in zip(args.runs, names(args.runs), strict=True)]
    for run in runs:
        if run.unreadable:
            print(f"{run.name}: {run.unreadable} unreadable line(s) ignored")
    draw(runs, args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    utils.run_script(main)
