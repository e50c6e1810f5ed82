"""One site: statistics, width and options -> its plan (kept neurons, constants, refitted weights)."""

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import PrunePeakError, brief
from ..models.loading import Model
from ..options import AUTO, DEVIATION, ELIMINATION, FILLS, FREQUENCY, NO_FILL, RANDOM, REAP, SCORES, PruningOptions
from ..sites.plan import SitePlan, SiteResult
from ..sites.site import Site
from ..stats.collection import SiteStats
from ..stats.covariance import Moments
from ..stats.expert_use import UseSummary
from ..stats.histogram import Summary
from .refit import output_error, refit_best
from .scores import Candidates, score_deviation

FEW_TOKENS_SCORE = "activation-norm"  # replaces elimination where there are more neurons than tokens


def plan_site(source: Model, stats: SiteStats, kept: int, options: PruningOptions) -> SiteResult:
    """The plan of one site, refitted if asked for.

    Raises:
        PrunePeakError: statistics that are not positive definite.
    """
    try:
        return _plan(source, stats, kept, options)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise PrunePeakError(
            f"the statistics of {stats.site.name} are not positive definite ({brief(error)}). Run `prune-peak "
            "calibrate` again."
        ) from None


def _plan(source: Model, stats: SiteStats, kept: int, options: PruningOptions) -> SiteResult:
    if stats.use is not None:
        return _plan_experts(stats.site, stats.use, kept, options)
    site, summary = stats.site, stats.stats.summarize()
    device = summary.mean.device
    weight, bias = (tensor if tensor is None else tensor.to(device) for tensor in site.read_projection(source))
    assert weight is not None
    second_order = None if stats.accumulator is None else stats.accumulator.second_order()
    fill, score = options.fill, options.score
    assert score is not None
    if site.folded_into is None:  # without a bias to shift, everything is computed about zero
        fill, second_order = "zero", None if second_order is None else second_order.about_zero()
    moments = second_order.whole if second_order is not None and isinstance(second_order.whole, Moments) else None
    if score == ELIMINATION and moments is None and not site.always_kept:
        score = FEW_TOKENS_SCORE
    seed, names = options.seed + site.block, list(FILLS) if fill == AUTO else [fill]
    first = select(site, summary, weight, kept, names[0], score, seed, moments)
    plans = {names[0]: first}
    for name in names[1:]:
        if score == ELIMINATION:  # does not depend on the fill
            plans[name] = replace(first, fill=FILLS[name](summary).float())
        else:
            plans[name] = select(site, summary, weight, kept, name, score, seed, moments)
    if fill == AUTO:
        assert second_order is not None
        errors = {name: output_error(weight, bias, plan, second_order.held_out) for name, plan in plans.items()}
        fill = min(errors, key=lambda name: errors[name])
    plan = plans[fill]
    result = SiteResult(plan, fill, _lost_share(Candidates(site, weight, summary, plan.fill), plan.keep), score=score)
    if options.refit:
        assert second_order is not None
        plan, refit = refit_best(weight, bias, plan, second_order)
        result = replace(result, plan=plan, refit=refit)
    completed, scores_lost = site.kind.complete(
        site, result.plan, [(moments.mean, moments.covariance) for moments in stats.outputs]
    )
    return replace(result, plan=completed.cpu(), scores_lost=scores_lost)


def _plan_experts(site: Site, use: UseSummary, kept: int, options: PruningOptions) -> SiteResult:
    """The experts to keep; nothing is folded or refitted."""
    score = options.score
    assert score is not None
    if score not in (REAP, FREQUENCY, RANDOM):
        score = ELIMINATION if use.stay is not None else REAP
    drawn = torch.rand(site.neurons, generator=torch.Generator().manual_seed(options.seed + site.block))
    scores = {REAP: use.norm, FREQUENCY: use.served.double(), RANDOM: drawn, ELIMINATION: use.stay}[score]
    assert scores is not None
    keep = keep_best(site, scores, kept)
    total = use.norm * use.served
    lost = 1 - float(total[keep].sum() / total.sum().clamp_min(1e-300))
    return SiteResult(SitePlan(keep, torch.zeros(site.neurons)), NO_FILL, lost, score=score)


def select(
    site: Site,
    summary: Summary,
    weight: Tensor,
    kept: int,
    fill: str,
    score: str = DEVIATION,
    seed: int = 0,
    moments: Moments | None = None,
) -> SitePlan:
    """Keep the units with the highest scores, as many of every group.

    Args:
        weight: (hidden, neurons), the output projection.
        kept: neurons to keep.
        seed: of the random score; give every site its own.
        moments: for elimination.
    """
    constants = FILLS[fill if site.folded_into is not None else "zero"](summary).float()
    if site.always_kept:
        return SitePlan(torch.arange(site.always_kept), constants)
    scores = SCORES[score](Candidates(site, weight, summary, constants, kept, seed, moments))
    return SitePlan(keep_best(site, scores, kept), constants)


def keep_best(site: Site, scores: Tensor, kept: int) -> Tensor:
    """The sorted neurons of the units with the highest sums of scores, as many of every group: (kept,).

    Of blocks that leave, it is the neurons that a site always keeps. Ties go to the lower index.
    """
    if site.always_kept:
        return torch.arange(site.always_kept)
    units = scores.view(site.groups, -1, site.unit).sum(-1)
    best = units.argsort(dim=1, descending=True, stable=True)[:, : kept // (site.unit * site.groups)].sort().values
    first = torch.arange(site.groups, device=best.device)[:, None] * units.shape[1]
    return ((first + best).flatten()[:, None] * site.unit + torch.arange(site.unit, device=best.device)).flatten()


def _lost_share(neurons: Candidates, keep: Tensor) -> float:
    """The pruned neurons' share of the deviation of all neurons from their fills."""
    deviation = score_deviation(neurons)
    return 1 - (deviation[keep].sum() / deviation.sum().clamp_min(1e-300)).item()
