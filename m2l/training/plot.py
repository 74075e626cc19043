"""The curves of a run's losses, as an SVG beside it, drawn without any plotting library."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from m2l import storage
from m2l.training.metrics import read_figures

_WIDTH, _HEIGHT, _LEFT, _BELOW = 640, 360, 56, 40
_COLOURS = {"loss": "#3366cc", "validation_loss": "#cc5500"}
_NAMES = {"loss": "training", "validation_loss": "validation"}

Curve = list[tuple[int, float]]


def draw(out: Path, title: str) -> None:
    """Draws loss.svg from metrics.jsonl; nothing where there is no loss yet."""
    curves: dict[str, Curve] = {name: [] for name in _COLOURS}
    for figures in read_figures(out):
        for name, curve in curves.items():
            if name in figures and math.isfinite(figures[name]):
                curve.append((figures["step"], figures[name]))
    curves = {name: curve for name, curve in curves.items() if curve}
    if curves:
        storage.write_atomic(out / "loss.svg", svg(curves, title))


def svg(curves: dict[str, Curve], title: str) -> str:
    """The picture of curves of (step, loss), by name."""
    points = [point for curve in curves.values() for point in curve]
    last = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    right, top, bottom = _WIDTH - 16, 36, _HEIGHT - _BELOW

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * step / max(last, 1)

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (loss - low) / ((high - low) or 1.0)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{html.escape(title)}</text>',
    ]
    for tick in ticks:
        parts += [
            f'<path d="M{_LEFT} {y(tick):.1f}H{right}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    for tick in _ticks(0, last):
        if tick <= last:
            parts.append(
                f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
            )
    parts.append(f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end">step</text>')
    for number, (name, curve) in enumerate(curves.items()):
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        colour = _COLOURS[name]
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{right}" y="{top + 16 + 16 * number}" fill="{colour}" '
            f'text-anchor="end">{_NAMES[name]}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float, about: int = 5) -> Sequence[float]:
    """Round numbers from below `low` to above `high`."""
    step = 10 ** math.floor(math.log10(((high - low) or 1.0) / about))
    step *= next(m for m in (1, 2, 5, 10) if m * step * about >= (high - low))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]
