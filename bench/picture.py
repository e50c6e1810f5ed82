"""The picture at the top of the README: `python bench/picture.py` draws docs/pictures/size-quality-*.svg.

Perplexity against size, and answers that loop, from the recorded runs in docs/data. The description in the files holds
a digest of what was drawn, which `tests/test_docs.py` compares with the recorded runs.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "pictures"
SHARES = ("10 %", "20 %", "30 %", "50 %")
TOP = 92  # of the axis of perplexity


@dataclass(frozen=True)
class Theme:
    """Colours; those of the lines are told apart by colour-blind readers (Okabe and Ito)."""

    text: str
    grid: str
    ours: str
    healed: str
    rival: str


THEMES = {
    "light": Theme("#1f2328", "#d8dee4", "#c44e00", "#00805d", "#0072b2"),
    "dark": Theme("#e6edf3", "#30363d", "#f0883e", "#3fd0a4", "#58b0f0"),
}


def choose_figures() -> dict[str, Any]:
    """What the picture shows: parameters in millions, perplexities, and answers that loop."""
    quality, healing = (json.loads((DOCS / "data" / f"{name}.json").read_text()) for name in ("quality", "healing"))
    methods, runs = quality["methods"], healing["runs"]
    [talk] = [run["talk"] for run in runs if "talk" in run]
    longest = max(runs, key=lambda run: run["tokens"])
    return {
        "millions": [round(number / 1e6) for number in methods["parameters"]],
        "dense": [round(quality["both kinds"]["parameters"][0] / 1e6), methods["dense"]],
        "lines": {name: methods["perplexity"][name][: len(SHARES)] for name in ("magnitude", "FLAP", "prune-peak")},
        "healed": [round(number, 2) for number in longest["perplexity"][1:]],
        "tokens": longest["tokens"],
        "loops": [each["loops"] for each in talk],
    }


def digest(figures: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def draw(theme: Theme, figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.3, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.5, 1))
    for axes in (left, right):
        axes.set_facecolor("none")
        axes.tick_params(colors=theme.text, length=0, labelsize=9)
        axes.spines[:].set_visible(False)
    _draw_perplexity(left, theme, figures)
    _draw_loops(right, theme, figures["loops"])
    return figure


def _draw_perplexity(axes: Axes, theme: Theme, figures: dict[str, Any]) -> None:
    places = [0.0, *(float(share.split()[0]) for share in SHARES)]
    _, dense = figures["dense"]
    lines, styles = figures["lines"], {"FLAP": (theme.rival, "s-"), "prune-peak": (theme.ours, "o-")}
    for name, (colour, style) in styles.items():
        axes.plot(places, [dense, *lines[name]], style, color=colour, linewidth=2, markersize=5)
    deleted = lines["magnitude"][0]
    axes.plot([0, 10 * (TOP - dense) / (deleted - dense)], [dense, TOP], color=theme.text, linewidth=2, linestyle=":")
    before, after = figures["healed"]
    arrow = {"arrowstyle": "-|>", "color": theme.healed, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 2}
    axes.annotate("", (30, after), (30, before), arrowprops=arrow)
    axes.plot([30], [after], "D", color=theme.healed, markersize=6)
    notes = (
        (1, TOP - 3, f"weights deleted by magnitude:\n{deleted:,} at 10 %", theme.text, "left"),
        (47.5, lines["FLAP"][-1] + 4, f"FLAP's criterion: {lines['FLAP'][-1]:.0f}", theme.rival, "right"),
        (50.5, lines["prune-peak"][-1] - 7, f"prune-peak: {lines['prune-peak'][-1]:.0f}", theme.ours, "right"),
        (31.5, after - 1.5, f"healed: {after:.1f}", theme.healed, "left"),
        (1, dense - 3, f"original: {dense:.1f}", theme.text, "left"),
    )
    for x, y, words, colour, side in notes:
        axes.text(x, y, words, color=colour, ha=side, va="top", fontsize=9.5, fontweight="bold")
    axes.set_ylim(18, TOP)
    axes.set_xlim(-2, 51)
    sizes = (figures["dense"][0], *figures["millions"])
    axes.set_xticks(places, [f"{share}\n{size} M" for share, size in zip(("0 %", *SHARES), sizes, strict=True)])
    axes.set_xlabel("share of the MLP neurons pruned, and parameters left", color=theme.text, fontsize=9)
    axes.set_title("Perplexity on WikiText-2", color=theme.text, fontsize=10.5, loc="left")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_loops(axes: Axes, theme: Theme, loops: list[int]) -> None:
    names = ("original", "30 %\npruned", "healed")
    bars = axes.bar(names, loops, color=(theme.text, theme.ours, theme.healed), width=0.6)
    axes.bar_label(bars, color=theme.text, fontsize=10, fontweight="bold", padding=2)
    axes.set_ylim(0, 24)
    axes.set_yticks([])
    axes.set_title("Answers that loop, of 40", color=theme.text, fontsize=10.5, loc="left")
    axes.set_xlabel("calibrated with no data set", color=theme.text, fontsize=9)
    axes.axhline(0, color=theme.grid, linewidth=1)


def main() -> None:
    figures = choose_figures()
    matplotlib.rcParams["svg.hashsalt"] = "prune-peak"  # the same figures give the same bytes
    PICTURES.mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        metadata = {"Date": None, "Creator": None, "Description": digest(figures)}
        draw(theme, figures).savefig(PICTURES / f"size-quality-{name}.svg", transparent=True, metadata=metadata)


if __name__ == "__main__":
    main()
