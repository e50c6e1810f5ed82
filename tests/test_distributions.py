"""Distributions are those that numpy would find, the first token is apart, and moves are measured in deviations."""

import pytest
import torch
from tiny import BY_NAME, VOCABULARY
from torch import Tensor

from prune_peak.ablation import Choice, ablated
from prune_peak.calibration import into_batches, observing
from prune_peak.distributions import FIRST, REST, Shaping, compare, describe, find_striking, measure_distributions
from prune_peak.source import open_source
from prune_peak.study import find_studied, load_whole


def shape_of(values: Tensor):  # type: ignore[no-untyped-def]
    shaping = Shaping(values.shape[1], len(values))
    for part in values.split(999):
        shaping.add(part)
    return shaping.shape()


def test_moments_are_those_of_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, 1, generator=generator) + 7
    skewed = -torch.rand(20_000, 1, generator=generator).log()  # exponential: skewness 2, excess kurtosis 6
    two = torch.where(torch.rand(20_000, 1, generator=generator) < 0.5, -1.0, 1.0)
    values = torch.cat([normal, skewed, two], 1)
    shape, exact = shape_of(values), values.double()
    centred = exact - exact.mean(0)
    deviation = centred.square().mean(0).sqrt()
    torch.testing.assert_close(shape.deviation, deviation, rtol=1e-5, atol=0)
    torch.testing.assert_close(shape.skewness, centred.pow(3).mean(0) / deviation**3, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shape.kurtosis, centred.pow(4).mean(0) / deviation**4 - 3, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(shape.bimodality, torch.tensor([1 / 3, 5 / 9, 1.0]).double(), rtol=0.1, atol=0)
    assert shape.peak_from_zero[0] > 6
    assert shape.peak_from_mean[1] < -0.7  # an exponential has its mode at 0, mean and deviation 1; smoothing blurs it


def test_a_neuron_that_never_moves_has_no_shape_but_a_peak() -> None:
    shape = shape_of(torch.full((100, 1), 0.7))
    assert abs(shape.peak.item() - 0.7) < 1e-6
    assert shape.skewness.isnan().all()


@pytest.mark.parametrize("name", ["llama-untied", "opt"])  # OPT's MLP lays the tokens of all windows end to end
def test_the_first_token_is_apart(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = open_source(str(BY_NAME[name].save(tmp_path)))
    sites = find_studied(source)
    windows = torch.randint(3, VOCABULARY, (6, 32))
    found = list(measure_distributions(source, sites, into_batches(windows, tokens=64), torch.float32))
    assert [each.site.name for each in found] == [site.name for site in sites]
    model, seen = load_whole(source, torch.float32).requires_grad_(False), []
    with observing(model.get_submodule(sites[-1].name), lambda values: seen.append(values.double())):
        model(windows)
    last, values = found[-1], seen[0].view(6, 32, -1)
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


def test_the_most_striking_neurons_are_found_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = open_source(str(BY_NAME["llama-untied"].save(tmp_path)))
    windows = torch.randint(3, VOCABULARY, (6, 32))
    found = list(measure_distributions(source, find_studied(source), into_batches(windows), torch.float32))
    striking = find_striking(found, "mlp")
    assert len({(neuron.site.name, neuron.index) for neuron in striking}) == len(striking) == 3 + 5
    furthest = next(neuron for neuron in striking if neuron.why == "peak furthest from zero")
    distances = [each.rest.peak_from_zero.abs().max() for each in found if each.site.kind == "mlp"]
    assert distances[furthest.site.block] == max(distances)


def test_moves_are_in_deviations_and_none_on_the_same_text(tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = open_source(str(BY_NAME["gpt2"].save(tmp_path)))
    sites = find_studied(source, ["mlp"])
    batches = into_batches(torch.randint(3, VOCABULARY, (6, 32)))
    found = list(measure_distributions(source, sites, batches, torch.float32))
    assert all(not move.peak.any() and not move.mean.any() for move in compare(found, found))
    other = list(measure_distributions(source, sites, into_batches(torch.randint(3, 9, (6, 32))), torch.float32))
    move = compare(found, other)[0]
    a, b = found[0].rest, other[0].rest
    expected = (a.mean - b.mean).abs() / ((a.deviation**2 + b.deviation**2) / 2).sqrt()
    torch.testing.assert_close(move.mean, expected)
    assert move.mean.median() > 0.05


def test_hooks_and_distributions_speak_of_the_same_neurons(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Held at 5, a neuron's peak, mean and median are 5."""
    source = open_source(str(BY_NAME["gpt2"].save(tmp_path)))
    sites = find_studied(source, ["mlp"])
    model = load_whole(source, torch.float32)
    plan = {site.name: Choice(torch.arange(1, site.neurons), torch.full((site.neurons,), 5.0)) for site in sites}
    shaping = Shaping(sites[0].neurons, 64)
    with (
        torch.inference_mode(),
        ablated(model, sites, plan),
        observing(model.get_submodule(sites[0].name), lambda x: shaping.add(x.flatten(0, 1))),
    ):
        model(torch.randint(3, VOCABULARY, (2, 32)))
    shape = shaping.shape()
    assert shape.peak[0] == shape.mean[0] == shape.median[0] == 5
    assert (shape.peak[1:] != 5).all()
