"""Distributions match their definitions, first tokens are separate, and drifts are in deviations."""

import pytest
import torch
from tiny import BY_NAME, VOCABULARY
from torch import Tensor

from prune_peak.data.windows import into_batches
from prune_peak.models.loading import open_model
from prune_peak.sites.hooks import SitePlan, ablated, observed
from prune_peak.studies.distributions import (
    FIRST,
    REST,
    MomentAccumulator,
    compare,
    describe,
    find_extreme_neurons,
    measure_distributions,
)
from prune_peak.studies.runner import find_studied, load_whole


def moments_of(values: Tensor):  # type: ignore[no-untyped-def]
    accumulator = MomentAccumulator(values.shape[1], len(values))
    for part in values.split(999):
        accumulator.add(part)
    return accumulator.moments()


def test_moments_match_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, 1, generator=generator) + 7
    skewed = -torch.rand(20_000, 1, generator=generator).log()  # exponential: skewness 2, excess kurtosis 6
    two = torch.where(torch.rand(20_000, 1, generator=generator) < 0.5, -1.0, 1.0)
    values = torch.cat([normal, skewed, two], 1)
    moments, exact = moments_of(values), values.double()
    centred = exact - exact.mean(0)
    deviation = centred.square().mean(0).sqrt()
    torch.testing.assert_close(moments.deviation, deviation, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.skewness, centred.pow(3).mean(0) / deviation**3, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.kurtosis, centred.pow(4).mean(0) / deviation**4 - 3, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moments.bimodality, torch.tensor([1 / 3, 5 / 9, 1.0]).double(), rtol=0.1, atol=0)
    assert moments.peak_from_zero[0] > 6
    assert (
        moments.peak_from_mean[1] < -0.7
    )  # an exponential has its mode at 0, mean and deviation 1; smoothing blurs it


def test_constant_neuron() -> None:
    moments = moments_of(torch.full((100, 1), 0.7))
    assert abs(moments.peak.item() - 0.7) < 1e-6
    assert moments.skewness.isnan().all()


@pytest.mark.parametrize("name", ["llama-untied", "opt"])  # OPT's MLP joins the tokens of all windows
def test_first_tokens_are_separate(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = open_model(str(BY_NAME[name].save(tmp_path)))
    sites = find_studied(source)
    windows = torch.randint(3, VOCABULARY, (6, 32))
    found = list(measure_distributions(source, sites, into_batches(windows, tokens=64), torch.float32))
    assert [each.site.name for each in found] == [site.name for site in sites]
    model, inputs = load_whole(source, torch.float32).requires_grad_(False), []
    with observed(model.get_submodule(sites[-1].name), lambda values: inputs.append(values.double())):
        model(windows)
    last, values = found[-1], inputs[0].view(6, 32, -1)
    torch.testing.assert_close(last.first.mean, values[:, 0].mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(last.rest.mean, values[:, 1:].mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert (last.first.tokens, last.rest.tokens) == (6, 6 * 31)
    rows = describe(found[0])
    assert [(row["tokens"], row["head"]) for row in rows] == [
        (tokens, head) for tokens in (REST, FIRST) for head in (None, 0, 1, 2, 3)
    ]
    assert rows[1]["neurons"] * 4 == rows[0]["neurons"]
    part = found[0].rest
    share = (part.peak[:8].abs() > part.deviation[:8] / 2).double().mean().item()
    assert rows[1]["peak_off_zero"] == share


def test_extreme_neurons_are_listed_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = open_model(str(BY_NAME["llama-untied"].save(tmp_path)))
    windows = torch.randint(3, VOCABULARY, (6, 32))
    found = list(measure_distributions(source, find_studied(source), into_batches(windows), torch.float32))
    extreme = find_extreme_neurons(found, "mlp")
    assert len({(neuron.site.name, neuron.index) for neuron in extreme}) == len(extreme) == 3 + 5
    furthest = next(neuron for neuron in extreme if neuron.label == "peak furthest from zero")
    distances = [each.rest.peak_from_zero.abs().max() for each in found if each.site.label == "mlp"]
    assert distances[furthest.site.block] == max(distances)


def test_drift_between_texts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = open_model(str(BY_NAME["gpt2"].save(tmp_path)))
    sites = find_studied(source, ["mlp"])
    batches = into_batches(torch.randint(3, VOCABULARY, (6, 32)))
    found = list(measure_distributions(source, sites, batches, torch.float32))
    assert all(not drift.peak.any() and not drift.mean.any() for drift in compare(found, found))
    other = list(measure_distributions(source, sites, into_batches(torch.randint(3, 9, (6, 32))), torch.float32))
    drift = compare(found, other)[0]
    a, b = found[0].rest, other[0].rest
    expected = (a.mean - b.mean).abs() / ((a.deviation**2 + b.deviation**2) / 2).sqrt()
    torch.testing.assert_close(drift.mean, expected)
    assert drift.mean.median() > 0.05


def test_hooks_and_distributions_use_the_same_neurons(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A neuron held at 5 has peak, mean and median 5."""
    source = open_model(str(BY_NAME["gpt2"].save(tmp_path)))
    sites = find_studied(source, ["mlp"])
    model = load_whole(source, torch.float32)
    plan = {site.name: SitePlan(torch.arange(1, site.neurons), torch.full((site.neurons,), 5.0)) for site in sites}
    accumulator = MomentAccumulator(sites[0].neurons, 64)
    with (
        torch.inference_mode(),
        ablated(model, sites, plan),
        observed(model.get_submodule(sites[0].name), lambda x: accumulator.add(x.flatten(0, 1))),
    ):
        model(torch.randint(3, VOCABULARY, (2, 32)))
    moments = accumulator.moments()
    assert moments.peak[0] == moments.mean[0] == moments.median[0] == 5
    assert (moments.peak[1:] != 5).all()
