"""How much to prune: from a ratio or a size target to the neurons kept at every site."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import product

import numpy
from transformers import PreTrainedModel

from ..conversion.choice import choose_conversion
from ..errors import PrunePeakError, UsageError, spell
from ..models.loading import ModelSpec
from ..options import Budget
from ..sites.blocks import BlocksSite
from ..sites.site import Site

Widths = dict[str, int]  # name of a site: neurons kept; a site that stays whole is not named

MOST_WIDTHS = 8  # widths of the other kinds of site that are tried for a size target


def find_allocations(spec: ModelSpec, sites: Sequence[Site], budget: Budget, output_class: str) -> list[Widths]:
    """The ways to meet the budget, the same width for all sites of a kind.

    A ratio has one way. A size target over several kinds of site has several: for each of at most 8 numbers of heads,
    evenly spread, the widest MLP that fits.

    Raises:
        UsageError: a target over several kinds, one of them experts.
        PrunePeakError: nothing would be pruned, nothing kept, or the target cannot be reached.
    """
    first: dict[str, Site] = {}
    for site in sorted(sites, key=lambda site: site.label):  # attention before the MLP, whose steps are finer
        first.setdefault(site.label, site)
    steps = {kind: common_step(site, sites, budget.multiple_of) for kind, site in first.items()}

    def expand(kept: Mapping[str, int]) -> Widths:
        """The widths of the sites of the kinds that become narrower."""
        narrower = {kind for kind, width in kept.items() if width < first[kind].neurons}
        return {
            site.name: match_width(site, first[site.label], kept[site.label], budget.multiple_of)
            for site in sites
            if site.label in narrower
        }

    if budget.ratio is not None:
        ratios = budget.ratio if isinstance(budget.ratio, Mapping) else dict.fromkeys(first, budget.ratio)
        return [expand({kind: kept_width(site.neurons, ratios[kind], steps[kind]) for kind, site in first.items()})]

    def parameters(kept: Mapping[str, int]) -> int:
        widths = {
            site.name: match_width(site, first[site.label], kept[site.label], budget.multiple_of) for site in sites
        }
        return count_parameters(choose_conversion(spec, sites, widths, spec.dtype, output_class).meta_model)

    if len(first) > 1 and {*first} & {"experts", "expert-mlp"}:
        raise UsageError(f"a size target prunes experts as one kind alone. Pass {spell('ratio')} for every kind.")
    *others, last = first
    choices = [[(kind, width) for width in _spread(first[kind].neurons, steps[kind])] for kind in others]
    widths = range(steps[last], first[last].neurons + 1, steps[last])
    if not widths:
        raise PrunePeakError(
            f"multiples of {steps[last]} of {first[last].neurons} neurons would keep none. Choose a smaller "
            f"{spell('multiple_of')}."
        )
    most = _most_parameters(spec, budget)
    allocations = []
    for chosen in map(dict, product(*choices)):
        fitting = bisect_right(widths, most, key=lambda width: parameters(chosen | {last: width}))
        if fitting:
            allocations.append(expand(chosen | {last: widths[fitting - 1]}))
    if {} in allocations:
        raise PrunePeakError(f"{spec.name} is within the target already: nothing would be pruned.")
    if not allocations:
        least = parameters({kind: steps[kind] for kind in first})
        raise PrunePeakError(
            f"the target cannot be reached: with one unit left at every site, {least:,} parameters remain. Choose a "
            f"larger target, or prune both kinds ({spell('sites', ('mlp', 'attention'))})."
        )
    return allocations


def drop_last(spec: ModelSpec, sites: Sequence[BlocksSite], budget: Budget, output_class: str) -> Widths:
    """The last blocks, as many as leave; which ones do is decided when they have been measured.

    Raises:
        PrunePeakError: nothing would be pruned, nothing kept, or the target cannot be reached.
    """
    widths = [{site.name: site.always_kept for site in sites[-count:]} for count in range(1, len(sites) + 1)]
    if budget.ratio is not None:
        ratio = budget.ratio[sites[0].label] if isinstance(budget.ratio, Mapping) else budget.ratio
        count = sites[0].blocks - kept_width(sites[0].blocks, ratio, 1, "blocks")
        if count > len(sites):
            raise PrunePeakError(f"{count} of {sites[0].blocks} blocks would leave, but only {len(sites)} can.")
        return widths[count - 1]
    most = _most_parameters(spec, budget)
    if count_parameters(spec.meta_model) <= most:
        raise PrunePeakError(f"{spec.name} is within the target already: nothing would be pruned.")
    for dropped in widths:
        left = [site for site in sites if site.name in dropped]
        found = count_parameters(choose_conversion(spec, left, dropped, spec.dtype, output_class).meta_model)
        if found <= most:
            return dropped
    raise PrunePeakError(
        f"the target cannot be reached: with the first block alone, {found:,} parameters remain. Choose a larger "
        "target."
    )


def common_step(first: Site, sites: Sequence[Site], multiple_of: int | None) -> int:
    """The neurons by which the first site of a kind becomes narrower; all stages with one ratio lose the same share."""
    keys = first.config_values.keys()
    stages = [site.neurons for site in sites if site.label == first.label and site.config_values.keys() == keys]
    return math.lcm(first.kind.step(first, multiple_of), first.neurons // math.gcd(first.neurons, *stages))


def match_width(site: Site, first: Site, kept: int, multiple_of: int | None = None) -> int:
    """The neurons to keep at a site where `kept` are kept at the first of its kind: the same share.

    A stage that is twice as wide keeps twice as many, as its config has one ratio for both.
    """
    if site.neurons == first.neurons:
        return kept
    if site.config_values.keys() == first.config_values.keys() and kept * site.neurons % first.neurons == 0:
        return kept * site.neurons // first.neurons
    step = site.kind.step(site, multiple_of)
    return min(site.neurons, max(step, round(site.neurons * kept / first.neurons / step) * step))


def _spread(neurons: int, step: int) -> list[int]:
    """At most 8 widths of a kind of site, evenly spread."""
    widths = range(step, neurons + 1, step)
    return list(dict.fromkeys(widths[round(part)] for part in numpy.linspace(0, len(widths) - 1, MOST_WIDTHS)))


def _most_parameters(spec: ModelSpec, budget: Budget) -> int:
    if budget.target_bytes is not None:
        return budget.target_bytes // spec.dtype.itemsize
    assert budget.target_params is not None
    return int(budget.target_params * count_parameters(spec.meta_model))


def count_parameters(meta_model: PreTrainedModel) -> int:
    """The number of parameters, tied ones once."""
    tied = meta_model.all_tied_weights_keys
    return sum(tensor.numel() for name, tensor in meta_model.state_dict().items() if name not in tied)


def kept_width(width: int, ratio: float, step: int, what: str = "neurons") -> int:
    """The number of `width` neurons to keep when a share of `ratio` is pruned: the nearest multiple of `step`.

    Raises:
        PrunePeakError: a ratio so small or large that nothing would be pruned, or nothing kept.

    Example:
        >>> kept_width(1536, 0.3, 32)
        1088
    """
    kept = round(width * (1 - ratio) / step) * step
    if not 0 < kept < width:
        raise PrunePeakError(
            f"ratio {ratio} of {width} {what}, in multiples of {step}, would "
            f"{'keep none' if kept == 0 else 'prune none'}. Choose another ratio, or a smaller {spell('multiple_of')}."
        )
    return kept
