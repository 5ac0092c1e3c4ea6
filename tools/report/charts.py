"""Charts of the report as inline SVG, without a plotting library.

Colours and fonts come from the page's style sheet (classes), so they follow light and dark mode.
A group of samples is a <g class="bin" data-bin=...>, which the page makes clickable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from lib.evaluation.metrics import PRECISION_AT
from tools.report.breakdown import Breakdown, Mean

Values = npt.NDArray[np.float64]

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 36, 12, 24, 50
PLOT_W, PLOT_H = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
SERIES = 6  # classes s0 .. s5 of the style sheet
HISTOGRAM_BINS = 20


def _x(share: float) -> float:
    return LEFT + share * PLOT_W


def _y(share: float) -> float:
    return TOP + (1 - share) * PLOT_H


def _text(x: float, y: float, text: str, css: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(body: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )


def _frame(y_title: str, x_title: str, top: float = 0, numbers: bool = True) -> Iterator[str]:
    """Horizontal grid lines and both titles.

    Args:
        y_title, x_title: of the axes.
        top: where the scale ends; 0: at 100 %.
        numbers: whether the x axis is one of numbers, not of groups with their counts.
    """
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _y(share)
        css = "axis" if share == 0 else "grid"
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="{css}"/>'
        number = f"{(top or 100) * share:,.0f}"
        yield _text(LEFT - 5, y + 4, number, "tick", "end")
    yield _text(2, 12, y_title, "title", "start")
    yield _text(_x(0.5), HEIGHT - (20 if numbers else 4), x_title, "title")


def _round_up(value: int) -> int:
    """The next number that four equal steps of a round whole number reach."""
    size = 10 ** (len(str(value)) - 1)
    steps = sorted(
        int(n * size * scale) for n in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) for scale in (0.1, 1)
    )
    return next(4 * step for step in steps if step and 4 * step >= value)


def histogram(iou: Values) -> str:
    """How many samples have which IoU.

    Args:
        iou: (N,), in [0, 1].
    """
    edges = np.arange(HISTOGRAM_BINS + 1) / HISTOGRAM_BINS  # not linspace: as read from a text
    counts = np.histogram(iou, edges)[0]
    top = max(4, _round_up(int(counts.max())))
    parts = list(_frame("expressions", "IoU", top))
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        last = " " if high == 1 else " (without) "
        what = f"IoU {low:.2f} to{last}{high:.2f}: {count:,} of {len(iou):,}"
        x, width, height = _x(low) + 0.75, PLOT_W / HISTOGRAM_BINS - 1.5, count / top * PLOT_H
        parts.append(
            f'<g class="bin" data-bin="iou:{low:.2f}:{high:.2f}"><title>{what}</title>'
            f'<rect class="hit" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{PLOT_H}"/>'
            f'<rect class="bar" x="{x:.1f}" y="{_y(0) - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"/></g>'
        )
    parts += [_text(_x(k), _y(0) + 16, f"{k:g}", "tick") for k in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return _svg("".join(parts), f"Histogram of the IoU of {len(iou):,} expressions")


def precision(iou: Values) -> Values:
    """(101,) share of samples with an IoU of at least K, for K = 0, 0.01, … 1.

    Args:
        iou: (N,), in [0, 1].
    """
    return np.array([(iou >= k / 100).mean() for k in range(101)])  # 0.6 is the same float here


def precision_curves(series: Mapping[str, Values], mean: str = "mIoU") -> str:
    """P@K over K, a line a split; the published thresholds are marked.

    Args:
        series: IoUs (N,) by name.
        mean: what the area below a line is.
    """
    parts = list(_frame("P@K, % of expressions", "K, least IoU that counts as right"))
    for i, (name, iou) in enumerate(series.items()):
        shares, css = precision(iou), f"s{i % SERIES}"
        points = " ".join(f"{_x(k / 100):.1f},{_y(p):.1f}" for k, p in enumerate(shares))
        parts.append(f'<polyline class="line {css}" points="{points}"/>')
        for k in PRECISION_AT:
            p = float(shares[round(100 * k)])
            title = f"{name}: P@{k} = {100 * p:.2f} %"
            parts.append(
                f'<circle class="dot {css}" cx="{_x(k):.1f}" cy="{_y(p):.1f}" r="3.5">'
                f"<title>{escape(title)}</title></circle>"
            )
    parts += [_text(_x(k), _y(0) + 16, f"{k:g}", "tick") for k in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    key = "".join(
        f'<li><svg viewBox="0 0 34 10"><line class="line s{i % SERIES}" x2="34" y1="5" y2="5"/>'
        f"</svg>{escape(name)}: area below = {mean} = {100 * iou.mean():.2f}</li>"
        for i, (name, iou) in enumerate(series.items())
    )
    svg = _svg("".join(parts), f"Precision at K of {', '.join(series)}")
    return f'{svg}<ul class="series">{key}</ul>'


def group_means(breakdown: Breakdown, means: Sequence[Mean], overall: float) -> str:
    """Mean IoU of each group with its interval and number.

    Args:
        breakdown: the groups.
        means: of each.
        overall: mean IoU of all samples, in [0, 1]; a dashed line.
    """
    parts = list(_frame("mean IoU, %", breakdown.axis, numbers=False))
    y = _y(overall)
    parts.append(f'<line class="mean" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for i, (label, mean) in enumerate(zip(breakdown.labels, means, strict=True)):
        parts.append(_group(breakdown, i, label, mean))
    return _svg("".join(parts), f"Mean IoU by {breakdown.title.lower()}")


def _group(breakdown: Breakdown, index: int, label: str, mean: Mean) -> str:
    width = PLOT_W / len(breakdown.labels)
    x = LEFT + (index + 0.5) * width
    tick = "tick tight" if len(breakdown.labels) > 7 else "tick"
    below = _text(x, _y(0) + 15, label, tick) + _text(x, _y(0) + 28, _short(mean.n), "count")
    if index == 0:
        below += _text(LEFT - 5, _y(0) + 28, "n", "count", "end")
    if not mean.n:
        return below
    title = f"{label}: {100 * mean.value:.1f} %, n = {mean.n:,}"
    marks = f'<circle class="dot s0" cx="{x:.1f}" cy="{_y(mean.value):.1f}" r="4.5"/>'
    if math.isfinite(mean.low):
        least, most = max(0.0, mean.low), min(1.0, mean.high)
        title += f", 95 % interval {100 * least:.1f} to {100 * most:.1f}"
        low, high = _y(least), _y(most)
        ends = "".join(f"M{x - 5:.1f} {end:.1f}h10" for end in (low, high))
        marks = f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>' + marks
    hit = (
        f'<rect class="hit" x="{x - width / 2:.1f}" y="{TOP}" width="{width:.1f}" '
        f'height="{PLOT_H + 32}"/>'
    )
    return (
        f'<g class="bin" data-bin="{breakdown.key}:{index}"><title>{escape(title)}</title>'
        f"{hit}{marks}{below}</g>"
    )


def _short(n: int) -> str:
    """A count that fits below its group."""
    return f"{n:,}" if n < 10_000 else f"{n / 1000:.0f}k"
