"""One trial: neurons held by hooks, the model evaluated."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.windows import into_batches
from ..errors import UsageError, spell
from ..evaluation.quality import EvalSet, WindowScores, concatenate, score_logits
from ..models.bfloat16 import fast_products
from ..models.loading import Model
from ..models.stream import Batch
from ..options import FILLS, NEURON, RESAMPLE
from ..pruning.scores import rank_neurons
from ..sites.blocks import Blocks
from ..sites.finding import find_sites, prunable_kinds
from ..sites.hooks import ablated, draw_others, resampled
from ..sites.mlp import Mlp
from ..sites.plan import SitePlan
from ..sites.site import Site
from ..stats.collection import collect
from ..stats.histogram import Summary
from .trials import BASELINE, Trial

KINDS = ("mlp", "attention")  # in the order that their seeds are numbered
SITE_SEEDS = 1_000_000  # distance between the seeds of two trials; every site has its own seed
TOKENS_AT_ONCE, IMAGES_AT_ONCE = 1024, 16  # of one forward pass; the logits of a large vocabulary are large


def find_studied(model: Model, kinds: Sequence[str] | None = None) -> list[Site]:
    """The sites whose single neurons a study holds, whatever shapes a checkpoint can have; all by default.

    Raises:
        UsageError: a kind that has no single neurons.
    """
    if kinds and Blocks.label in kinds:
        raise UsageError(f"a study holds single neurons, not whole blocks. Pass {spell('sites', Mlp.label)}.")
    kinds = kinds or prunable_kinds(model.meta_model, model.family)
    return find_sites(model.meta_model, model.family, kinds, NEURON, keep_shape=True)


def summarize(model: Model, sites: Sequence[Site], windows: Tensor, dtype: torch.dtype) -> dict[str, Summary]:
    """The statistics of every site on windows, by the site's name."""
    return {each.site.name: each.stats.summarize() for each in collect(model, sites, into_batches(windows), dtype)}


def load_whole(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model with all its weights in memory."""
    stock: PreTrainedModel = model.load(dtype)
    stock.config.use_cache = False
    return stock


class TrialRunner:
    """A stock model and an evaluation set, to measure trials.

    Args:
        summaries: statistics of every site, by its name.
        score: what ranks the neurons; None for a random order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        summaries: Mapping[str, Summary],
        eval_set: EvalSet,
        score: str | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.summaries = summaries
        self.score = score
        self.batches = list(_gather(eval_set))

    def measure(self, trial: Trial) -> WindowScores:
        """Cross-entropy and top-1 under the hooks of a trial, window by window."""
        with self._hold(trial):
            return self.evaluate()

    @torch.inference_mode()
    def evaluate(self) -> WindowScores:
        """The scores of the model with whatever hooks it has."""
        with fast_products():
            return concatenate([score_logits(self.model(**batch).logits, targets) for batch, targets in self.batches])

    def _hold(self, trial: Trial) -> AbstractContextManager[None]:
        if trial == BASELINE:
            return nullcontext()
        sites = [site for site in self.sites if site.label == trial.site]
        keeps = {site.name: self._keep(site, trial) for site in sites}
        if trial.fill == RESAMPLE:
            return resampled(self.model, sites, keeps, draw_others(torch.Generator().manual_seed(trial.seed)))
        fills = {site.name: FILLS[trial.fill](self.summaries[site.name]).float() for site in sites}
        return ablated(self.model, sites, {name: SitePlan(keep, fills[name]) for name, keep in keeps.items()})

    def _keep(self, site: Site, trial: Trial) -> Tensor:
        """The neurons that a trial does not hold; a larger fraction holds a superset of a smaller one."""
        if self.score is None:
            seed = SITE_SEEDS * trial.seed + len(KINDS) * site.block + KINDS.index(site.label)
            order = torch.randperm(site.neurons, generator=torch.Generator().manual_seed(seed))
        else:
            # the mean of a resampled neuron is its mean
            fill = "mean" if trial.fill == RESAMPLE else trial.fill
            weight = site.as_matrix(self.model.get_parameter(site.weight))
            order = rank_neurons(self.score, site, weight, self.summaries[site.name], fill).argsort(stable=True)
        return order[round(trial.fraction * site.neurons) :].sort().values


def _gather(eval_set: EvalSet) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of several windows, so that a token can take its values from another window."""
    batch = {name: torch.cat([part[name] for part in eval_set.batches]) for name in eval_set.batches[0]}
    targets = torch.cat(list(eval_set.targets))
    at_once = max(2, TOKENS_AT_ONCE // batch["input_ids"].shape[1]) if "input_ids" in batch else IMAGES_AT_ONCE
    count = max(1, len(targets) // at_once)
    parts = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    for number, part in enumerate(targets.tensor_split(count)):
        yield {name: tensors[number] for name, tensors in parts.items()}, part
