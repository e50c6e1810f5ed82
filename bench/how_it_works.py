"""The pictures of docs/how-it-works.md: `python bench/how_it_works.py` draws docs/pictures/how-*.svg.

The histogram of a neuron and the fold are those of `examples/vit-mini`, the refit is that of `examples/llama-mini`, and
healing is the longest recorded run.
"""

import json
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from picture import DOCS, PICTURES
from torch import Tensor

from prune_peak.data.images import choose_images
from prune_peak.data.self_generated import generate_windows
from prune_peak.data.windows import into_batches
from prune_peak.models.loading import Model, open_model
from prune_peak.options import PruningOptions
from prune_peak.pruning.refit import output_error
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.finding import find_sites
from prune_peak.sites.plan import SitePlan
from prune_peak.stats.collection import SiteStats, collect

EXAMPLES = DOCS.parent / "examples"
GREY, BLUE, ORANGE, GREEN = "#6e7781", "#0072b2", "#c44e00", "#00805d"
KEPT = 0.7


def measure(source: Model, windows: Tensor) -> list[SiteStats]:
    """The statistics of the MLPs."""
    sites = find_sites(source.meta_model, source.family, ["mlp"])
    return list(collect(source, sites, into_batches(windows), torch.float32, for_refit=True))


def draw_histogram(axes: Axes, found: SiteStats) -> None:
    """The neuron whose peak is farthest from zero and from its mean, in deviations."""
    summary = found.stats.summarize()
    distance = torch.minimum(summary.peak.abs(), (summary.peak - summary.mean).abs()) / summary.variance.sqrt()
    neuron = int(distance.argmax())
    counts = found.stats.histogram[neuron, 1:-1]
    low, width = found.stats.low[neuron].item(), found.stats.width[neuron].item()
    edges = [low + width * (1 + step) for step in range(len(counts) + 1)]
    axes.stairs(counts.tolist(), edges, fill=True, color="#d0d7de")
    top = counts.max().item()
    marks = (
        ("peak: the most frequent", summary.peak, ORANGE, 1.12, "left"),
        ("mean", summary.mean, BLUE, 0.8, "left"),
        ("zero", torch.zeros_like(summary.mean), GREY, 0.8, "right"),
    )
    for name, values, colour, height, side in marks:
        value = values[neuron].item()
        axes.plot([value, value], [0, height * top], color=colour, linewidth=2)
        place = value + (4 if side == "left" else -4) * width
        axes.text(place, height * top, name, color=colour, fontweight="bold", ha=side, va="top")
    axes.set(xlabel=f"activation of neuron {neuron}, block {found.site.block}", ylabel="tokens", yticks=[])


def draw_fold(axes: Axes, source: Model, found: SiteStats, plan: SitePlan) -> None:
    """The output projection's matrix of some neurons, the pruned ones marked, and the bias before and after."""
    weight, bias = found.site.read_projection(source)
    rows, columns = 24, 40
    cut = torch.ones(found.site.neurons, dtype=torch.bool)
    cut[plan.keep] = False
    shown = weight[:rows, :columns].float()
    limit = shown.abs().quantile(0.98).item()
    axes.imshow(shown.numpy(), cmap="Greys", vmin=-limit, vmax=limit, aspect="auto", extent=(0, columns, rows, 0))
    for column in cut[:columns].nonzero()[:, 0].tolist():
        axes.fill_between([column, column + 1], 0, rows, color=ORANGE, alpha=0.55, linewidth=0)
    assert bias is not None
    after = bias.double() + weight[:, cut].double() @ plan.fill[cut].double()
    scale = 6 / max(bias[:rows].abs().max().item(), after[:rows].abs().max().item())
    for left, values, colour in ((52, bias, GREY), (70, after, ORANGE)):
        lengths = [scale * value for value in values[:rows].tolist()]
        axes.barh([row + 0.5 for row in range(rows)], lengths, left=left, color=colour, height=0.7)
    for place, words, colour in (
        (columns / 2, "output weights: a column per neuron,\npruned ones coloured", ORANGE),
        (52, "bias", GREY),
        (70, "bias + what pruned\nneurons always add", ORANGE),
    ):
        axes.text(place, -1, words, color=colour, ha="center", va="bottom", fontweight="bold", fontsize=9)
    axes.set_xlim(0, 80)
    axes.set_ylim(rows, -5)
    axes.set_axis_off()


def draw_refit(axes: Axes, source: Model, stats: list[SiteStats]) -> None:
    """The error of every block's output on tokens that nothing was fitted to, as a share of deletion's."""
    steps: dict[str, tuple[str, list[float]]] = {
        "deleted": (GREY, []),
        "peak folded": (ORANGE, []),
        "refitted": (BLUE, []),
    }
    for found in stats:
        weight, bias = found.site.read_projection(source)
        kept = int(KEPT * found.site.neurons) // 8 * 8
        refitted = plan_site(source, found, kept, PruningOptions()).plan
        assert found.accumulator is not None
        held_out = found.accumulator.second_order().held_out
        plans = (
            SitePlan(refitted.keep, torch.zeros_like(refitted.fill)),
            SitePlan(refitted.keep, refitted.fill),
            refitted,
        )
        errors = [output_error(weight, bias, plan, held_out) for plan in plans]
        for (_, shares), error in zip(steps.values(), errors, strict=True):
            shares.append(error / errors[0])
    for number, (name, (colour, shares)) in enumerate(steps.items()):
        places = [block + 0.27 * (number - 1) for block in range(len(shares))]
        axes.bar(places, shares, width=0.25, color=colour)
        for place, share in zip(places, shares, strict=True):
            axes.text(place, share / 2, name, color="white", rotation=90, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(stats)), [f"block {found.site.block}" for found in stats])
    axes.set(ylabel="error of the output, deletion = 1", ylim=(0, 1.1), yticks=(0, 0.5, 1))


def draw_healing(axes: Axes) -> None:
    """The divergence from the original on held-out windows, by the tokens learned."""
    runs = json.loads((DOCS / "data" / "healing.json").read_text())["runs"]
    [run] = [run for run in runs if "divergence_by_tokens" in run]
    before, after = run["divergence"]
    points = [(0, before), *run["divergence_by_tokens"], (run["tokens"], after)]
    axes.plot([tokens / 1000 for tokens, _ in points], [value for _, value in points], "o-", color=GREEN, linewidth=2)
    axes.text(3, before + 0.005, f"pruned: {before:.2f}", color=GREEN, fontweight="bold", va="bottom")
    axes.text(run["tokens"] / 1000, after - 0.012, f"{after:.2f}", color=GREEN, fontweight="bold", ha="right", va="top")
    axes.set(xlabel="thousand tokens learned (SmolLM2-135M, 30 % of the MLP)", ylabel="divergence (nats per token)")
    axes.set_ylim(0, 0.3)


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "prune-peak"
    PICTURES.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    source = open_model(str(EXAMPLES / "vit-mini"))
    first = measure(source, choose_images(str(EXAMPLES / "digits" / "calibration"), source, 100, 0).calibration)[0]
    llama = open_model(str(EXAMPLES / "llama-mini"))
    plan = plan_site(source, first, int(KEPT * first.site.neurons) // 8 * 8, PruningOptions(refit=False)).plan
    for name in ("peak", "fold", "refit", "heal"):
        figure = Figure(figsize=(7.3, 3), layout="constrained")
        axes = figure.subplots()
        if name == "peak":
            draw_histogram(axes, first)
        elif name == "fold":
            draw_fold(axes, source, first, plan)
        elif name == "refit":
            draw_refit(axes, llama, measure(llama, generate_windows(llama, 48, 128, 0).calibration))
        else:
            draw_healing(axes)
        save(figure, PICTURES / f"how-{name}.svg")


if __name__ == "__main__":
    main()
