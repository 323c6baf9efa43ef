"""A report as a picture: one bar a side for the figures with peers, one stacked bar for the phases. Pure."""

from __future__ import annotations

from html import escape

from casemate.bench.report import Report

__all__ = ["svg"]

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#9d755d", "#bab0ac")
_WIDTH, _LEFT, _BAR, _GAP = 860, 130, 22, 12


def svg(report: Report) -> str:
    """The report as an SVG document."""
    parts: list[str] = []
    top = 50
    bars = [
        (side, figure.unit, value)
        for figure in report.figures
        if figure.peers
        for side, value in [
            (f"{figure.name}: ours", figure.ours.p50),
            *((name, one.p50) for name, one in figure.peers.items()),
        ]
    ]
    phases = [figure for figure in report.figures if figure.name.startswith("phase_")]
    longest = max([value for _, _, value in bars] + [sum(figure.ours.p50 for figure in phases)] + [1e-9])
    scale = (_WIDTH - _LEFT - 90) / longest
    for name, unit, value in bars:
        parts.append(_text(_LEFT - 8, top + 15, name, "end"))
        parts.append(_rect(_LEFT, top, value * scale, _COLOURS[0]))
        parts.append(_text(_LEFT + value * scale + 6, top + 15, f"{value:.1f} {unit}"))
        top += _BAR + _GAP
    if phases:
        parts.append(_text(_LEFT - 8, top + 15, "phases (p50)", "end"))
        at = float(_LEFT)
        legend = top + _BAR + 24
        for number, figure in enumerate(phases):
            colour = _COLOURS[number % len(_COLOURS)]
            parts.append(_rect(at, top, figure.ours.p50 * scale, colour))
            at += figure.ours.p50 * scale
            parts.append(_rect(_LEFT, legend - 12, 14, colour, 14))
            label = f"{figure.name.removeprefix('phase_')}: {figure.ours.p50:.1f} {figure.unit}"
            parts.append(_text(_LEFT + 22, legend, label))
            legend += 20
        top = legend
    title = _text(
        12, 24, f"{report.bench}: {', '.join(f'{key} {value}' for key, value in report.versions.items())}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top + 20}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f"{title}{''.join(parts)}</svg>\n"
    )


def _rect(x: float, y: float, width: float, colour: str, height: float = _BAR) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
