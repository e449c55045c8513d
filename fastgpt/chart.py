"""Line charts as inline SVG: no library, no script, coloured by the CSS classes of the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 12, 38  # margins, px
_MOST_POINTS = 600  # a chart has about as many pixels
_MOST_DOTS = 60


@dataclass(frozen=True)
class Series:
    """One curve: ``color`` 0..3 picks the CSS class, ``style`` how its points are drawn."""

    name: str
    points: Sequence[Point]
    color: int = 0
    style: Literal["line", "faint", "dots"] = "line"


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    log: bool = False,
    width: int = 480,
    height: int = 220,
    format_y: Callable[[float], str] | None = None,
    x_label: str = "step",
) -> str:
    """An ``<svg>`` with axes, ticks and curves.

    Non-finite values (and those <= 0 on a logarithmic axis) interrupt their curve and are marked on
    the x axis. Long curves are thinned: faint ones keep the extremes, others are averaged.

    Args:
        series: curves; later ones are drawn over earlier ones.
        label: what a screen reader says.
        log: logarithmic y axis.
        width: of the drawing, px; it scales with the page.
        height: px.
        format_y: text of a y tick; by size when ``None``.
        x_label: what the x axis counts.
    """
    drawable = [(s, _segments(s, log)) for s in series]
    shown = [p for _, segments in drawable for segment in segments for p in segment]
    lost = [x for s in series for x, y in s.points if not _usable(y, log)]
    head = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )
    if not shown:
        text = "no finite values" if lost else "no values"
        return f'{head}<text x="{width / 2}" y="{height / 2}" class="mid">{text}</text></svg>'
    x_axis = _axis([p[0] for p in shown] + lost, _LEFT, width - _RIGHT, log=False, whole=True)
    y_axis = _axis([p[1] for p in shown], height - _BOTTOM, _TOP, log=log)
    parts = [head, _grid(x_axis, y_axis, width, height, format_y or y_axis.text, x_label)]
    for one, segments in drawable:
        draw = _dots if one.style == "dots" and len(one.points) <= _MOST_DOTS else _paths
        parts.append(draw(one, segments, x_axis, y_axis))
    base = height - _BOTTOM
    for x in sorted(set(lost))[:50]:
        at = f"{x_axis.place(x):.1f}"
        title = f"{x_label} {x:g}: not finite"
        parts.append(f'<circle cx="{at}" cy="{base}" r="3.5" class="lost">{_title(title)}</circle>')
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """The names of the curves beside their colours, as HTML."""
    items = [
        f'<li><span class="key c{s.color} {s.style}"></span>{escape(s.name)}</li>' for s in series
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def smooth(points: Sequence[Point], share: float = 0.02) -> list[Point]:
    """Triangular average over ``share`` of the finite points, centred: a fall does not lag."""
    steps, values = [], []
    for x, y in points:
        if math.isfinite(y):
            steps.append(x)
            values.append(y)
    last = len(values) - 1
    half = math.ceil(share * len(values) / 4)
    for _ in range(2):  # a box twice is a triangle
        sums = [0.0, *itertools.accumulate(values)]
        reach = [min(half, i, last - i) for i in range(last + 1)]
        values = [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]
    return list(zip(steps, values, strict=True))


@dataclass(frozen=True)
class _Axis:
    """Maps values to px between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[float]
    text: Callable[[float], str]

    def place(self, value: float) -> float:
        low, high = (math.log10(v) if self.log else v for v in (self.low, self.high))
        value = math.log10(value) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _axis(
    values: Sequence[float], start: float, end: float, *, log: bool, whole: bool = False
) -> _Axis:
    low, high = min(values), max(values)
    if log:
        low, high = (low / 1.1, high * 1.1) if high < low * 1.5 else (low, high)
        return _Axis(low, high, start, end, True, _log_ticks(low, high), lambda v: f"{v:.3g}")
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        pad = 0.5 if whole else abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = _tick_step(high - low, 6 if whole else 5)
    if whole:
        step = max(1.0, step)
    else:  # the curve ends on grid lines
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return _Axis(low, high, start, end, False, ticks, lambda v: number(v, decimals))


def _tick_step(span: float, count: int) -> float:
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 7)]
    return [low, high]


def number(value: float, decimals: int) -> str:
    """``value`` for people: 12k, 1,200, 0.25, 3e-04."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.4g}{unit}"
    return f"{value:,.{decimals}f}" if decimals <= 3 else f"{value:.2g}"


def _usable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _segments(series: Series, log: bool) -> list[list[Point]]:
    """The curve between its gaps, thinned."""
    segments: list[list[Point]] = [[]]
    for x, y in series.points:
        if _usable(y, log):
            segments[-1].append((x, y))
        elif segments[-1]:
            segments.append([])
    if series.style == "dots" and len(series.points) <= _MOST_DOTS:
        return [segment for segment in segments if segment]
    return [_thin(segment, series.style == "faint") for segment in segments if segment]


def _thin(points: list[Point], extremes: bool) -> list[Point]:
    size = math.ceil(len(points) / _MOST_POINTS)
    if size == 1:
        return points
    thinned = []
    for start in range(0, len(points), size * (1 + extremes)):
        bucket = points[start : start + size * (1 + extremes)]
        if extremes:  # a spike of one step stays in sight
            ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
            thinned += sorted(ends)
        else:
            n = len(bucket)
            thinned.append((sum(p[0] for p in bucket) / n, sum(p[1] for p in bucket) / n))
    return thinned if extremes else [points[0], *thinned, points[-1]]


def _grid(
    x: _Axis, y: _Axis, width: int, height: int, text: Callable[[float], str], label: str
) -> str:
    base, right = height - _BOTTOM, width - _RIGHT
    parts = []
    for value in y.ticks:
        at = f"{y.place(value):.1f}"
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at}" class="y">{escape(text(value))}</text>')
    for value in x.ticks:
        at = f"{x.place(value):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{base}" y2="{base + 4}" class="axis"/>')
        parts.append(f'<text x="{at}" y="{base + 17}" class="x">{number(value, 0)}</text>')
    parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{base}" y2="{base}" class="axis"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:g}" y="{height - 5}" class="x">{escape(label)}</text>')
    return "".join(parts)


def _paths(series: Series, segments: list[list[Point]], x: _Axis, y: _Axis) -> str:
    parts = []
    for segment in segments:
        places = [f"{x.place(px):.1f} {y.place(py):.1f}" for px, py in segment]
        if len(places) == 1:  # a line of one point would be invisible
            cx, cy = places[0].split()
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" class="dot c{series.color}"/>')
        else:
            faint = " faint" if series.style == "faint" else ""
            css = f"c{series.color}{faint}"
            parts.append(f'<path d="M{"L".join(places)}" class="{css}"/>')
    return "".join(parts)


def _dots(series: Series, segments: list[list[Point]], x: _Axis, y: _Axis) -> str:
    lines = [s for s in segments if len(s) > 1]
    parts = [_paths(Series(series.name, (), series.color), lines, x, y)]
    for px, py in (point for segment in segments for point in segment):
        title = _title(f"{series.name} at step {px:g}: {py:.4g}")
        at = f'cx="{x.place(px):.1f}" cy="{y.place(py):.1f}"'
        parts.append(f'<circle {at} r="3" class="dot c{series.color}">{title}</circle>')
    return "".join(parts)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"
