"""Pictures for pages: matplotlib without a screen, colours that colour-blind readers tell apart, units on every axis.

matplotlib is an extra (`[plots]`); ask `can_draw` first.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import CROSS_ENTROPY, METRICS, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = (
    "matplotlib is not installed, so no pictures were drawn, only tables written: pip install 'prune-peak[plots]'."
)

# Okabe and Ito's palette, with a marker each, so that no reader needs the colour
STYLES = {
    "zero": ("#000000", "o"),
    "mean": ("#0072B2", "s"),
    "median": ("#009E73", "^"),
    "peak": ("#D55E00", "D"),
    "resample": ("#CC79A7", "v"),
}
LABELS = {
    CROSS_ENTROPY: "cross-entropy gained (nats)",
    "top1": "top-1 accuracy lost (points)",
}
COLOURS = 96  # of a PNG's palette
WIDTH, HEIGHT, DOTS = 4.0, 3.0, 110  # of one panel in inches, and dots an inch


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw_degradation(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Degradation against the fraction held: a column a kind of site, a row a metric, a line a fill with its error."""
    sites = list(dict.fromkeys(curve.site for curve in curves))
    figure, panels = _panels(len(METRICS), len(sites))
    for row, metric in enumerate(METRICS):
        scale = 1.0 if metric == CROSS_ENTROPY else 100.0
        for column, site in enumerate(sites):
            axes = panels[row][column]
            for curve in curves:
                if (curve.site, curve.metric) == (site, metric):
                    _draw_curve(axes, curve, scale)
            axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
            axes.set_title(f"{site} neurons", fontsize=10)
            axes.set_xlabel("share of neurons held")
            axes.set_ylabel(LABELS[metric])
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{title} (bands: two standard errors)", fontsize=10)
    _save(figure, path)


def _draw_curve(axes: "Axes", curve: Curve, scale: float) -> None:
    colour, marker = STYLES[curve.fill]
    means = [scale * mean for mean, _ in curve.points()]
    errors = [2 * scale * (error or 0.0) for _, error in curve.points()]
    axes.plot(curve.fractions, means, color=colour, marker=marker, markersize=4, linewidth=1.2, label=curve.fill)
    low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(curve.fractions, low, high, color=colour, alpha=0.15, linewidth=0)


def _panels(rows: int, columns: int) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=DOTS, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: "Figure", path: Path) -> None:
    """As a PNG of few colours, a quarter of the size; the same numbers give the same bytes."""
    from PIL import Image  # matplotlib brings it

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(path, optimize=True)
