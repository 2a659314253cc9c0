"""Charts as SVG text. Colors are CSS classes, so that light and dark mode both work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 28, 34
MAX_POINTS = 300

Series = tuple[str, Sequence[float], Sequence[float]]

# Title, unit, whether the y axis is logarithmic, and (label, key in the log) of each curve.
Curves = Sequence[tuple[str, str, bool, Sequence[tuple[str, str]]]]


def curves(chosen: Curves, log: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (title, chart) of the curves for which a log has values.

    Args:
        chosen: the curves.
        log: rows of log.jsonl.
    """
    charts = []
    for title, unit, log_y, keys in chosen:
        series = [
            (
                label,
                [row["step"] for row in log if key in row],
                [row[key] for row in log if key in row],
            )
            for label, key in keys
            if any(key in row for row in log)
        ]
        charts.append((title, line_chart(series, "step", unit, log_y)))
    return [(title, chart) for title, chart in charts if chart]


def line_chart(series: Sequence[Series], x_label: str, y_label: str, log_y: bool = False) -> str:
    """Return a chart with a line per (label, xs, ys); empty without finite values.

    Long lines are averaged down to 300 points. ``log_y`` is for values that span decades.
    """
    drawn = [(label, *_thin(xs, ys)) for label, xs, ys in series]
    drawn = [(label, xs, ys) for label, xs, ys in drawn if xs]
    if not drawn:
        return ""
    xs_all = [x for _, xs, _ in drawn for x in xs]
    ys_all = [_log(y) if log_y else y for _, _, ys in drawn for y in ys]
    x_low, x_high = _widen(min(xs_all), max(xs_all))
    y_low, y_high = _widen(min(ys_all), max(ys_all))
    margin = 0.04 * (y_high - y_low)
    y_low, y_high = y_low - margin, y_high + margin
    parts = [_axes(x_low, x_high, y_low, y_high, x_label, y_label, log_y)]
    key_x = WIDTH - RIGHT
    for number, (label, xs, ys) in reversed(list(enumerate(drawn, start=1))):
        points = " ".join(
            f"{_x(x, x_low, x_high):.1f},{_y(_log(y) if log_y else y, y_low, y_high):.1f}"
            for x, y in zip(xs, ys, strict=True)
        )
        parts.append(f'<polyline class="line s{number}" points="{points}"/>')
        parts.append(
            f'<text class="key s{number}" x="{key_x}" y="14" text-anchor="end">{label}</text>'
        )
        key_x -= 7 * len(label) + 14
    return _svg(parts, f"{y_label} over {x_label}")


def bar_chart(
    values: Sequence[float], x_label: str, y_label: str, line: float | None = None
) -> str:
    """Return a chart of adjacent bars, drawn as one area; ``line`` is a reference level."""
    if not values:
        return ""
    top = max(max(values), line or 0) or 1.0
    count = len(values)
    points = [f"{LEFT},{HEIGHT - BOTTOM}"]
    for i, value in enumerate(values):
        y = _y(value, 0, top)
        points += [f"{_x(i, 0, count):.2f},{y:.2f}", f"{_x(i + 1, 0, count):.2f},{y:.2f}"]
    points.append(f"{WIDTH - RIGHT},{HEIGHT - BOTTOM}")
    parts = [
        _axes(0, count, 0, top, x_label, y_label, False),
        f'<polygon class="bars" points="{" ".join(points)}"/>',
    ]
    if line is not None:
        y = _y(line, 0, top)
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    return _svg(parts, f"{y_label} by {x_label}")


def _svg(parts: list[str], title: str) -> str:
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"'
    return f'<svg class="chart" {view}>{"".join(parts)}</svg>'


def _axes(
    x_low: float,
    x_high: float,
    y_low: float,
    y_high: float,
    x_label: str,
    y_label: str,
    log_y: bool,
) -> str:
    parts = []
    for value in _ticks(y_low, y_high):
        y = _y(value, y_low, y_high)
        shown = _number(10**value) if log_y else _number(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>'
        )
    for value in _ticks(x_low, x_high):
        x = _x(value, x_low, x_high)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="middle">{_number(value)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" '
        f'text-anchor="middle">{x_label}</text>'
    )
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="14">{y_label}</text>')
    return "".join(parts)


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    rough = (high - low) / wanted
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m for m in (1, 2, 5, 10) if m * magnitude >= rough) * magnitude
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _log(value: float) -> float:
    return math.log10(max(value, 1e-12))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    finite = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    xs = [x for x, _ in finite]
    ys = [y for _, y in finite]
    step = max(1, -(-len(xs) // MAX_POINTS))
    groups = [(xs[i : i + step], ys[i : i + step]) for i in range(0, len(xs), step)]
    return [sum(x) / len(x) for x, _ in groups], [sum(y) / len(y) for _, y in groups]
