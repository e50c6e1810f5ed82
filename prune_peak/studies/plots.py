"""Pictures of studies, with matplotlib (the extra `plots`; check `can_draw` first)."""

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .curves import CROSS_ENTROPY, METRICS, Curve
from .distributions import Distribution, Drift, Neuron, NeuronMoments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


MISSING = "matplotlib is not installed, so only tables were written, no pictures: pip install 'prune-peak[plots]'."

# Okabe and Ito's palette for colour-blind readers, with a marker each
STYLES = {
    "zero": ("#000000", "o"),
    "mean": ("#0072B2", "s"),
    "median": ("#009E73", "^"),
    "peak": ("#D55E00", "D"),
    "resample": ("#CC79A7", "v"),
}
OTHER_STYLE = ("#56B4E9", "x")  # of a fill that is not in the table
LABELS = {
    CROSS_ENTROPY: "cross-entropy gained (nats)",
    "top1": "top-1 accuracy lost (points)",
}
MOSTLY, ALMOST_ALWAYS = 0.5, 0.95  # of the tokens in one bin, which a histogram says in words
COLOURS = 96  # of a PNG's palette
WIDTH, HEIGHT, DOTS = 4.0, 3.0, 110  # of one panel in inches, and dots per inch


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_degradation(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Degradation by fraction: a column per kind of site, a row per metric, a line per fill with its error."""
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
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{title} (bands: two standard errors)", fontsize=10)
    _save(figure, path)


def _draw_curve(axes: "Axes", curve: Curve, scale: float) -> None:
    colour, marker = STYLES.get(curve.fill, OTHER_STYLE)
    means = [scale * mean for mean, _ in curve.points()]
    errors = [2 * scale * (error or 0.0) for _, error in curve.points()]
    axes.plot(curve.fractions, means, color=colour, marker=marker, markersize=4, linewidth=1.2, label=curve.fill)
    low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(curve.fractions, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_histograms(neurons: Sequence[Neuron], distributions: Sequence[Distribution], path: Path) -> None:
    """A panel per neuron: its histogram, with peak, mean and zero marked."""
    columns = 4
    figure, panels = _panels(-(-len(neurons) // columns), columns, width=2.6, height=2.3)
    shapes = {distribution.site.name: distribution.rest for distribution in distributions}
    for axes, neuron in zip(panels.flat, neurons, strict=False):
        _draw_histogram(axes, shapes[neuron.site.name], neuron.index)
        axes.set_title(f"{neuron.label}\nblock {neuron.site.block}, neuron {neuron.index}", fontsize=8)
        axes.set_xlabel("activation", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels.flat[len(neurons) :]:
        axes.axis("off")
    for axes in panels[:, 0]:
        axes.set_ylabel("tokens", fontsize=8)
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


def _draw_histogram(axes: "Axes", shape: NeuronMoments, index: int) -> None:
    counts = shape.histogram[index, 1:-1].reshape(-1, 2).sum(1)  # the end bins count everything beyond
    low, width = shape.low[index].item(), shape.width[index].item()
    if width:
        edges = [low + width * (1 + 2 * step) for step in range(len(counts) + 1)]
        axes.stairs(counts.tolist(), edges, fill=True, color="0.75")
    most = shape.histogram[index].max().item() / shape.tokens if width else 1.0
    if most > MOSTLY:
        peak = f"{shape.peak[index].item():.2g}"
        words = f"almost always {peak}" if most > ALMOST_ALWAYS else f"{peak} for {most:.0%}\nof the tokens"
        axes.text(0.95, 0.95, words, transform=axes.transAxes, fontsize=8, ha="right", va="top")
    if not counts.sum():
        axes.set(xticks=[], yticks=[])
    for name, value, colour, dashes in (
        ("zero", 0.0, STYLES["zero"][0], ":"),
        ("mean", shape.mean[index].item(), STYLES["mean"][0], "--"),
        ("peak", shape.peak[index].item(), STYLES["peak"][0], "-"),
    ):
        axes.axvline(value, color=colour, linestyle=dashes, linewidth=1.3, label=name)


def draw_heads(distributions: Sequence[Distribution], path: Path) -> None:
    """Maps of head by block for four numbers: medians over the neurons of a head."""
    of_heads = [distribution for distribution in distributions if distribution.site.label == "attention"]
    figure, panels = _panels(2, 2)
    measures: tuple[tuple[str, Callable[[NeuronMoments], Tensor]], ...] = (
        ("peak to zero (deviations)", lambda shape: shape.peak_from_zero.abs()),
        ("peak to mean (deviations)", lambda shape: shape.peak_from_mean.abs()),
        ("excess kurtosis", lambda shape: shape.kurtosis),
        ("bimodality (Sarle; uniform 0.56)", lambda shape: shape.bimodality),
    )
    for axes, (title, measure) in zip(panels.flat, measures, strict=True):
        values = [measure(d.rest).view(d.heads, -1).nanmedian(1).values for d in of_heads]
        image = axes.imshow(torch.stack(values, 1).numpy(), aspect="auto", origin="lower", cmap="cividis")
        _label_map(figure, axes, image, title, "head")
    _save(figure, path)


def draw_blocks(distributions: Sequence[Distribution], path: Path) -> None:
    """Maps of the MLP blocks for four numbers: the share of a block's neurons at every value."""
    of_mlps = [distribution for distribution in distributions if distribution.site.label == "mlp"]
    figure, panels = _panels(2, 2)
    measures: tuple[tuple[str, float, float, Callable[[NeuronMoments], Tensor]], ...] = (
        ("peak from zero (deviations)", -2, 2, lambda shape: shape.peak_from_zero),
        ("peak from mean (deviations)", -2, 2, lambda shape: shape.peak_from_mean),
        ("skewness", -6, 6, lambda shape: shape.skewness),
        ("excess kurtosis (log10 of 3 + it)", 0, 3, lambda shape: (shape.kurtosis + 3).log10()),
    )
    for axes, (label, low, high, measure) in zip(panels.flat, measures, strict=True):
        values = [measure(d.rest).nan_to_num(0.0).clamp(low, high) for d in of_mlps]
        shares = [each.float().histc(40, low, high) / len(each) for each in values]
        image = axes.imshow(
            torch.stack(shares, 1).numpy(),
            aspect="auto",
            origin="lower",
            cmap="cividis",
            extent=(-0.5, len(of_mlps) - 0.5, low, high),
        )
        _label_map(figure, axes, image, "share of neurons", label)
    _save(figure, path)


def draw_drift(drifts: Mapping[tuple[str, str], Sequence[Drift]], path: Path) -> None:
    """Drift of peaks and means between texts, by block: medians over neurons."""
    kinds = list(dict.fromkeys(drift.site.label for each in drifts.values() for drift in each))
    figure, panels = _panels(1, len(kinds))
    colours = [colour for colour, _ in STYLES.values()]
    for axes, kind in zip(panels[0], kinds, strict=True):
        for number, ((one, other), each) in enumerate(drifts.items()):
            of_kind = [drift for drift in each if drift.site.label == kind]
            blocks = [drift.site.block for drift in of_kind]
            for name, dashes in (("peak", "-"), ("mean", "--")):
                values = [getattr(drift, name).nanmedian().item() for drift in of_kind]
                label = f"{name}: {one} to {other}"
                axes.plot(blocks, values, dashes, color=colours[number % len(colours)], label=label)
        axes.set(title=f"{kind} neurons", xlabel="block", ylabel="drift (deviations)", ylim=(0, None))
        _count(axes.xaxis)
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=1, fontsize=7, frameon=False)
    _save(figure, path)


def _label_map(figure: "Figure", axes: "Axes", image: Any, title: str, label: str) -> None:
    axes.set(xlabel="block", ylabel=label)
    axes.set_title(title, fontsize=10)
    _count(axes.xaxis)
    if label == "head":
        _count(axes.yaxis)
    figure.colorbar(image, ax=axes)


def _count(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _panels(rows: int, columns: int, width: float = WIDTH, height: float = HEIGHT) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=DOTS, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: "Figure", path: Path) -> None:
    """Save as a PNG of few colours, a quarter of the size; the same numbers give the same bytes."""
    from PIL import Image  # a dependency of matplotlib

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(path, optimize=True)
