"""What compression costs in perplexity, with this project and with its rivals:

    python bench/quality.py --model DIR --calibration FILE --text FILE

One run, one model, one calibration: every method sees the same statistics and cuts as many neurons at every block; then
each result is measured on the same windows. The rivals are written from their papers (their criterion and constant,
not their code), and what each paper states of its own is checked in `tests/test_quality.py`.

    magnitude   the norm of all weights of a neuron or head; what is cut is zero
    Wanda-sp    sum over outputs of |W_ij| * ||x_j|| (Wanda, arXiv 2306.11695, made structured in FLAP's paper); zero
    FLAP        Var[x_j] * ||W_:j||^2, the mean as a bias (arXiv 2312.11983), the same width at every block
    optipfair   its own library, where installed; MLP only
    peak, mean, zero    this project with --no-refit, the constant named
    prune-peak  this project
"""

import argparse
import copy
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from prune_peak.data.sampling import draw_windows
from prune_peak.data.self_generated import generate_windows
from prune_peak.data.texts import read_windows
from prune_peak.data.windows import into_batches
from prune_peak.models.bfloat16 import fast_products
from prune_peak.models.execution import DTYPES
from prune_peak.models.loading import Model, open_model
from prune_peak.options import AUTO, Budget, PruningOptions
from prune_peak.pruning.budget import find_allocations
from prune_peak.pruning.site_pruning import keep_best, plan_site, select
from prune_peak.sites.finding import find_sites
from prune_peak.sites.hooks import ablated
from prune_peak.sites.plan import SitePlan
from prune_peak.stats.collection import SiteStats, collect

Method = Callable[[Model, SiteStats, int], SitePlan]


def magnitude(source: Model, observed: SiteStats, kept: int) -> SitePlan:
    site = observed.site
    units = site.neurons // site.unit
    scores = torch.zeros(units)
    for name, (axis, _) in site.slices.items():
        scores += source.read(name).float().square().movedim(axis, 0).reshape(units, -1).sum(1)
    return SitePlan(keep_best(site, scores.repeat_interleave(site.unit), kept), torch.zeros(site.neurons))


def wanda_sp(source: Model, observed: SiteStats, kept: int) -> SitePlan:
    site, summary = observed.site, observed.stats.summarize()
    weight = site.as_matrix(source.read(site.weight)).double()
    scores = weight.abs().sum(0) * summary.second_moment.sqrt()
    return SitePlan(keep_best(site, scores, kept), torch.zeros(site.neurons))


def flap(source: Model, observed: SiteStats, kept: int) -> SitePlan:
    site, summary = observed.site, observed.stats.summarize()
    weight = site.as_matrix(source.read(site.weight)).double()
    scores = summary.variance * weight.square().sum(0)
    return SitePlan(keep_best(site, scores, kept), summary.mean.float())


def constant(fill: str) -> Method:
    def method(source: Model, observed: SiteStats, kept: int) -> SitePlan:
        site = observed.site
        return select(site, observed.stats.summarize(), site.as_matrix(source.read(site.weight)), kept, fill)

    return method


def ours(source: Model, observed: SiteStats, kept: int) -> SitePlan:
    return plan_site(source, observed, kept, PruningOptions()).plan


METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda-sp": wanda_sp,
    "FLAP": flap,
    "zero": constant("zero"),
    "mean": constant("mean"),
    "peak": constant("peak"),
    "prune-peak": ours,
}
OPTIPFAIR = "optipfair"


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    losses = []
    for window in windows.split(1):
        with fast_products():
            logits = model(window).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).double())
    return math.exp(torch.stack(losses).mean().item())


def pruned_by_optipfair(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """A copy cut by optipfair's best criterion, the maximum absolute weight."""
    from optipfair import prune_model

    return prune_model(
        copy.deepcopy(model),
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * share,
        show_progress=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--calibration", required=True, help="a text, or self")
    parser.add_argument("--text", required=True, help="the text to measure on")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--windows", type=int, default=24, help="of the text")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5], help="of the MLP")
    parser.add_argument("--heads", type=float, nargs="*", default=[0.3333, 0.6667], help="ratios of attention")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, OPTIPFAIR], default=[*METHODS, OPTIPFAIR])
    parser.add_argument("--multiple-of", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="keep the figures in a file")
    options = parser.parse_args()

    source, dtype, length = open_model(str(options.model)), DTYPES[options.dtype], options.sequence_length
    if options.calibration == "self":
        windows = generate_windows(source, options.samples, length, options.seed).calibration
    else:
        windows = draw_windows(source, options.calibration, options.samples, length, options.seed).calibration
    test = read_windows(options.text, source, length)[: options.windows]
    kinds = [kind for kind, ratios in (("attention", options.heads), ("mlp", options.ratios)) if ratios]
    sites = find_sites(source.meta_model, source.family, kinds)
    asked = [("mlp", ratio) for ratio in options.ratios] + [("attention", ratio) for ratio in options.heads]
    kept: dict[tuple[str, float], int] = {}
    for kind, ratio in asked:
        budget = Budget(ratio={kind: ratio}, multiple_of=options.multiple_of)
        [widths] = find_allocations(source, [site for site in sites if site.label == kind], budget, AUTO)
        kept[kind, ratio] = next(iter(widths.values()))

    methods = [name for name in options.methods if name in METHODS]
    plans: dict[tuple[str, str, float], dict[str, SitePlan]] = {}
    for observed in collect(source, sites, into_batches(windows), dtype, for_refit="prune-peak" in methods):
        site = observed.site
        for name in methods:
            for kind, ratio in asked:
                if kind == site.label:
                    choice = METHODS[name](source, observed, kept[kind, ratio])
                    plans.setdefault((name, kind, ratio), {})[site.name] = choice

    model = source.model_class.from_pretrained(source.folder, dtype=dtype).eval()
    figures = {"dense": {"": perplexity(model, test)}}
    labels = {(kind, ratio): f"{kind} {1 - kept[kind, ratio] / site.neurons:.0%}" for kind, ratio in asked
              for site in sites if site.label == kind}  # fmt: skip
    for name, kind, ratio in tqdm(plans, desc="measure"):
        with ablated(model, [site for site in sites if site.label == kind], plans[name, kind, ratio]):
            figures.setdefault(name, {})[labels[kind, ratio]] = perplexity(model, test)
    if OPTIPFAIR in options.methods:
        width = max((site.neurons for site in sites if site.label == "mlp"), default=0)
        for kind, ratio in asked:
            if kind == "mlp":
                try:
                    pruned = pruned_by_optipfair(model, 1 - kept[kind, ratio] / width)
                    figures.setdefault(OPTIPFAIR, {})[labels[kind, ratio]] = perplexity(pruned, test)
                except ImportError:
                    tqdm.write("optipfair is not installed: left out")
                    break

    print(f"Perplexity of {options.model.name}, {options.dtype}, on {len(test)} windows of {length} tokens of "
          f"{Path(options.text).name}; calibrated on {len(windows)} x {length} tokens of "
          f"{Path(options.calibration).name}, seed {options.seed}. Dense: {figures['dense']['']:.2f}.\n")  # fmt: skip
    columns = list(labels.values())
    print(f"| | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, row in figures.items():
        if name != "dense":
            print(f"| {name} | {' | '.join(f'{row[label]:.2f}' if label in row else '-' for label in columns)} |")
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"figures": figures, "options": settings, **about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
