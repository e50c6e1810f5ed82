"""The rivals of `bench/quality.py`: what each paper states of its own criterion holds for ours of it."""

from pathlib import Path

import pytest
import torch
from quality import flap, magnitude, perplexity, wanda_sp
from test_law import load
from tiny import BY_NAME, VOCABULARY

from prune_peak.data.windows import into_batches
from prune_peak.models.loading import Model, open_model
from prune_peak.sites.finding import find_sites
from prune_peak.sites.hooks import ablated
from prune_peak.stats.collection import SiteStats, collect
from prune_peak.stats.histogram import Stats

KEPT = 40


@pytest.fixture
def source(tmp_path: Path) -> Model:
    return open_model(str(BY_NAME["llama-untied"].save(tmp_path / "source")))


def observe(source: Model, values: torch.Tensor) -> SiteStats:
    """The first MLP of the model, as if it had done `values`, (tokens, neurons)."""
    site = find_sites(source.meta_model, source.family)[0]
    stats = Stats(site.neurons, len(values))
    stats.add(values)
    return SiteStats(site, stats)


def test_magnitude_does_not_look_at_activations(source: Model) -> None:
    quiet, loud = observe(source, torch.randn(300, 64)), observe(source, torch.randn(300, 64) * torch.arange(64))
    assert torch.equal(magnitude(source, quiet, KEPT).keep, magnitude(source, loud, KEPT).keep)
    assert not torch.equal(wanda_sp(source, quiet, KEPT).keep, wanda_sp(source, loud, KEPT).keep)


def test_wanda_is_magnitude_times_the_norm_of_the_input(source: Model) -> None:
    """With inputs of one norm it is the weights' magnitude alone; a louder input weighs in proportion."""
    signs = torch.where(torch.rand(300, 64) < 0.5, -1.0, 1.0)  # every input has the norm sqrt(300)
    observed = observe(source, signs)
    weight = source.read(observed.site.weight).abs().sum(0)
    assert torch.equal(wanda_sp(source, observed, KEPT).keep, weight.topk(KEPT).indices.sort().values)
    factor = torch.linspace(0.1, 3, 64)
    scaled = observe(source, signs * factor)
    assert torch.equal(wanda_sp(source, scaled, KEPT).keep, (weight * factor).topk(KEPT).indices.sort().values)


def test_flap_keeps_the_mean_of_the_output_and_cuts_what_fluctuates_least(source: Model) -> None:
    values = torch.randn(300, 64) * torch.rand(64) + torch.randn(64) * 5
    observed = observe(source, values)
    choice = flap(source, observed, KEPT)
    weight = source.read(observed.site.weight)
    held = choice.fill.expand_as(values).clone()
    held[:, choice.keep] = values[:, choice.keep]
    assert torch.allclose((held @ weight.T).mean(0), (values @ weight.T).mean(0), atol=1e-4)
    fluctuation = ((values - values.mean(0)).square().mean(0) * weight.square().sum(0)).double()
    assert torch.equal(choice.keep, fluctuation.topk(KEPT).indices.sort().values)


def test_every_rival_can_cut_heads(tmp_path: Path) -> None:
    tiny = BY_NAME["llama-eight-heads"]
    source = open_model(str(tiny.save(tmp_path / "source")))
    sites = find_sites(source.meta_model, source.family, ["attention"])
    tokens = torch.randint(3, VOCABULARY, (6, 64))
    model = load(tmp_path / "source", tiny.head)
    dense = perplexity(model, tokens)
    for method in (magnitude, wanda_sp, flap):
        plan = {
            seen.site.name: method(source, seen, 16)
            for seen in collect(source, sites, into_batches(tokens), torch.float32)
        }
        with ablated(model, sites, plan):
            assert perplexity(model, tokens) != pytest.approx(dense, rel=1e-4)
