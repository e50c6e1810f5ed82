"""Prove what was discovered in a class: the law, on a small random model of the same class."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .conversion.choice import choose_conversion
from .conversion.layout import Conversion
from .errors import PrunePeakError, brief
from .models.families import computed_names, tensors_by_block
from .models.loading import ModelSpec
from .models.miniature import FEW_BLOCKS, build_miniature
from .options import OWN
from .pruning.budget import common_step, match_width
from .pruning.site_pruning import keep_best
from .sites.blocks import Blocks, BlocksSite
from .sites.finding import find_sites
from .sites.hooks import ablated
from .sites.plan import SitePlan
from .sites.site import Site
from .stats.contributions import find_adjuster

PROOF_BOUND = 2e-5  # of the largest output
LEAST_EFFECT = 1e-3  # of the largest output, below which a mistake could hide
MORE_BLOCKS = 4  # of the model that shows whether blocks can leave
SHARES = (0.3, 0.5, 0.75)  # to prune; the larger ones for classes that support few numbers of heads


def prove(spec: ModelSpec, kinds: Sequence[str]) -> None:
    """Refuse a discovered structure for which the law does not hold on a small random model of the class.

    Raises:
        PrunePeakError: no such model runs, or pruning it changes what it computes.
    """
    if not spec.family.discovered and Blocks.label not in kinds:
        return
    what = f"{spec.model_class.__name__} cannot be pruned ({', '.join(kinds)}): on a small random model of this class, "
    try:
        difference, effect = measure_law(spec, kinds)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # of the class
        raise PrunePeakError(f"{what}the pruned one does not run ({brief(error)}).") from None
    if not difference <= PROOF_BOUND:
        raise PrunePeakError(
            f"{what}the pruned one and the ablated one differ by {difference:.0e} of the largest output (expected at "
            f"most {PROOF_BOUND:.0e}): something else reads its neurons."
        )
    if effect < LEAST_EFFECT:
        raise PrunePeakError(f"{what}the pruned neurons change the output by {effect:.0e} only, which proves nothing.")


def measure_law(spec: ModelSpec, kinds: Sequence[str]) -> tuple[float, float]:
    """How far the pruned and the ablated small model are apart, and what the ablation changes, of the largest output.

    Raises:
        PrunePeakError: no class supports the smaller shapes.
    """
    model, inputs = build_miniature(spec.model_class, spec.config, MORE_BLOCKS if Blocks.label in kinds else FEW_BLOCKS)
    small = replace(spec, config=model.config, folder=Path(), name=f"a small {spec.model_class.__name__}")
    sites = find_sites(model, spec.family, kinds)
    conversion = _convert(small, sites)
    for site in conversion.sites:
        if isinstance(site, BlocksSite):
            _require_adder(model, site, inputs)
    plan = _draw_plan(conversion)
    pruned = _prune(model, conversion, plan)
    return compare_outputs(model, pruned, conversion.sites, plan, inputs)


@torch.inference_mode()
def _require_adder(model: PreTrainedModel, site: BlocksSite, inputs: Mapping[str, Tensor]) -> None:
    """Refuse a block whose MLP cannot take over what other blocks do.

    Raises:
        PrunePeakError: with the reason.
    """
    block = model.get_submodule(site.path)
    calls: list[Any] = []
    with_inputs = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    model(**inputs)
    with_inputs.remove()
    args, kwargs = calls[0]

    def run() -> Tensor:
        output = block(*args, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    find_adjuster(run, block, model.get_submodule(site.name))


def compare_outputs(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    sites: Sequence[Site],
    plan: Mapping[str, SitePlan],
    inputs: Mapping[str, Tensor],
) -> tuple[float, float]:
    """How far a pruned model is from the ablated one, and the ablated one from the original, of the largest output.

    In float64, or in float32 where the class computes a part of it in float32.
    """

    @torch.inference_mode()
    def compare() -> tuple[float, float]:
        given = {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in inputs.items()}
        found, original = outputs_of(pruned(**given)), outputs_of(model(**given))
        with ablated(model, sites, plan):
            expected = outputs_of(model(**given))
        largest = expected.abs().max()
        return ((found - expected).abs().max() / largest).item(), ((original - expected).abs().max() / largest).item()

    model.double(), pruned.double()
    with suppress(RuntimeError):
        return compare()
    model.float(), pruned.float()
    return compare()


def _convert(small: ModelSpec, sites: Sequence[Site]) -> Conversion:
    """The conversion of the small model at the first share that its class supports."""
    reason = PrunePeakError("nothing would be pruned")
    leaving = next((site for site in sites if isinstance(site, BlocksSite) and site.removed), None)
    if leaving is not None:  # the others get other numbers
        return choose_conversion(small, [leaving], {leaving.name: leaving.always_kept}, torch.float32, OWN)
    for share in SHARES:
        kept: dict[str, int] = {}
        for first in {site.label: site for site in reversed(sites)}.values():
            alike = [site for site in sites if site.label == first.label]
            step = common_step(first, alike, 1)
            width = max(step, round(first.neurons * (1 - share) / step) * step)
            kept |= {site.name: match_width(site, first, width, 1) for site in alike}
        if all(kept[site.name] == site.neurons for site in sites):
            continue
        try:
            return choose_conversion(small, sites, kept, torch.float32, OWN)
        except PrunePeakError as error:
            reason = error
    raise reason


def _draw_plan(conversion: Conversion) -> dict[str, SitePlan]:
    """Random neurons and constants."""
    generator = torch.Generator().manual_seed(0)
    plan = {}
    for site in conversion.sites:
        keep = keep_best(site, torch.rand(site.neurons, generator=generator), conversion.kept[site.name])
        fill = torch.randn(site.neurons, generator=generator)
        plan[site.name] = SitePlan(keep, fill if site.folded_into is not None else torch.zeros_like(fill))
    return plan


def _prune(model: PreTrainedModel, conversion: Conversion, plan: dict[str, SitePlan]) -> PreTrainedModel:
    """The pruned model, built by the class from the smaller config."""
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for block, names in tensors_by_block(model, conversion.source.family).items():
        tensors |= conversion.prune(block, {name: state[name] for name in names}, plan)
    pruned: PreTrainedModel = conversion.model_class(conversion.config).eval()
    pruned.config.use_cache = False
    missing = set(pruned.load_state_dict(tensors, strict=False).missing_keys)
    missing -= {*pruned.all_tied_weights_keys, *computed_names(pruned)}
    for name in missing:
        pruned.get_parameter(name).data.zero_()  # a bias that the class opens beside the one that is needed
    pruned.tie_weights()
    return pruned


def outputs_of(output: object) -> Tensor:
    """Logits, or the hidden states of a model without a head."""
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]  # type: ignore[index]
    return logits
