"""The refit against least squares itself, at its limits, and in a written checkpoint."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import EXAMPLES
from safetensors.torch import load_file, save_file
from test_compress import compress, run
from test_selection import site_of
from tiny import BY_NAME
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_peak
from prune_peak.pruning.elimination import PROTECTED, eliminate
from prune_peak.pruning.refit import PROJECTIONS, RefitSolver, output_error, refit_best
from prune_peak.sites.folding import fold
from prune_peak.sites.plan import SitePlan
from prune_peak.stats.covariance import ActivationBuffer, GramAccumulator, RawActivations, SecondOrderSplit, SplitGram

NEURONS, HIDDEN, KEPT = 24, 6, 15


def correlated(tokens: int, neurons: int = NEURONS) -> Tensor:
    return (
        torch.randn(tokens, neurons // 2) @ torch.randn(neurons // 2, neurons) + 0.3 * torch.randn(tokens, neurons) + 1
    )


def gram_of(values: Tensor) -> GramAccumulator:
    gram = GramAccumulator(values[0].clone())
    gram.add(values)
    return gram


def evidence_of(fitted: GramAccumulator, held_out: GramAccumulator) -> SecondOrderSplit:
    return SecondOrderSplit(fitted.moments(), held_out.moments(), fitted.moments())


def site() -> tuple[Tensor, Tensor, SitePlan]:
    keep = torch.randperm(NEURONS)[:KEPT].sort().values
    return torch.randn(HIDDEN, NEURONS), torch.randn(HIDDEN), SitePlan(keep, torch.randn(NEURONS))


def test_without_a_ridge_it_is_least_squares() -> None:
    values = correlated(400)
    weight, bias, choice = site()
    columns, offset = RefitSolver(weight, bias, choice, gram_of(values).moments()).solve(1e-10)
    design = numpy.concatenate([values[:, choice.keep].numpy(), numpy.ones((400, 1))], axis=1)
    wanted = (values @ weight.T + bias).numpy()
    solution = numpy.linalg.lstsq(design.astype(float), wanted.astype(float), rcond=None)[0]
    # products are summed in float32, and how that rounds depends on the processor
    assert numpy.allclose(columns.T.numpy(), solution[:-1], atol=1e-3)
    assert numpy.allclose(offset.numpy(), solution[-1], atol=1e-3)


def test_an_infinite_ridge_is_the_pure_fold() -> None:
    weight, bias, choice = site()
    equations = RefitSolver(weight, bias, choice, gram_of(correlated(400)).moments())
    for ridge in (math.inf, 1e12):
        columns, offset = equations.solve(ridge)
        assert torch.allclose(columns, weight[:, choice.keep], atol=1e-5)
        assert torch.allclose(offset, fold(weight, bias, choice.fill, choice.keep), atol=1e-5)


def test_keeping_all_is_the_identity() -> None:
    weight, bias, _ = site()
    everything = SitePlan(torch.arange(NEURONS), torch.zeros(NEURONS))
    columns, offset = RefitSolver(weight, bias, everything, gram_of(correlated(99)).moments()).solve(0.1)
    assert torch.allclose(columns, weight, atol=1e-6)
    assert torch.allclose(offset, bias, atol=1e-6)


def loss(weight: Tensor, values: Tensor, keep: Tensor) -> float:
    """What least squares leaves of the output, by numpy."""
    design = numpy.concatenate([values[:, keep].numpy(), numpy.ones((len(values), 1))], axis=1).astype(float)
    wanted = (values @ weight.T).numpy().astype(float)
    return float(((design @ numpy.linalg.lstsq(design, wanted, rcond=None)[0] - wanted) ** 2).mean())


def test_elimination_beats_plain_scores() -> None:
    values = correlated(800)
    weight = torch.randn(HIDDEN, NEURONS)
    keep = eliminate(site_of(NEURONS), weight, gram_of(values).moments(), KEPT)
    assert keep.tolist() == sorted(set(keep.tolist()))
    assert len(keep) == KEPT
    by_variance = (values.var(0) * weight.square().sum(0)).argsort(descending=True)[:KEPT]
    assert loss(weight, values, keep) < 0.9 * loss(weight, values, by_variance)


def test_the_strongest_neurons_stay() -> None:
    """Also one that others can take over: they may not on another text."""
    values = correlated(800)
    values[:, 0] = 3 * values[:, 1] + 3 * values[:, 2]
    weight = torch.randn(HIDDEN, NEURONS)
    keep = eliminate(site_of(NEURONS), weight, gram_of(values).moments(), KEPT)
    norms = values.square().mean(0) * weight.square().sum(0)
    strongest = norms.argsort(descending=True)[: int(PROTECTED * KEPT)].tolist()
    assert 0 in strongest
    assert set(strongest) <= set(keep.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_of_all_tokens(dtype: torch.dtype) -> None:
    """Also with means many deviations from zero, and in bfloat16 as exact as its own values."""
    values = (correlated(600) * (torch.arange(NEURONS) % 3 > 0) + 20).to(dtype)
    grams = SplitGram(values[0].float())
    for batch in values.split(250):
        grams.add(batch)
    exact = values.double()
    for moments, part in (
        (grams.second_order().whole, exact),
        (grams.second_order().held_out, torch.cat([batch[len(batch) * 5 // 6 :] for batch in exact.split(250)])),
    ):
        assert torch.allclose(moments.mean, part.mean(0), atol=1e-6)
        assert torch.allclose(moments.covariance.double(), part.T.cov(correction=0), atol=1e-3)


@pytest.mark.parametrize("about_zero", [False, True])
@pytest.mark.parametrize("tokens", [12, 60])
def test_activations_equal_moments(tokens: int, about_zero: bool) -> None:
    """Few tokens or many, ridge regression and its error are the same from activations as from their products."""
    values = correlated(tokens) + 3
    weight, bias, choice = site()
    if about_zero:
        choice = replace(choice, fill=torch.zeros(NEURONS))
    grams, tape = SplitGram(values[0].clone()), ActivationBuffer()
    for batch in values.split(7):
        grams.add(batch)
        tape.add(batch)
    pair = grams.second_order(), tape.second_order()
    for name in ("fitted", "held_out", "whole"):
        moments, rows = (getattr(part.about_zero() if about_zero else part, name) for part in pair)
        assert torch.allclose(rows.mean, moments.mean, atol=1e-6)
        assert torch.allclose(rows.variance, moments.variance, rtol=1e-4)
        for ridge in (0.01, 1.0, math.inf):
            columns, offset = RefitSolver(weight, bias, choice, moments).solve(ridge)
            columns_of_rows, offset_of_rows = RefitSolver(weight, bias, choice, rows).solve(ridge)
            assert torch.allclose(columns_of_rows, columns, atol=2e-3)
            assert torch.allclose(offset_of_rows, offset, atol=2e-2)
            refitted = replace(choice, weight=columns, bias=offset)
            assert output_error(weight, bias, refitted, rows) == pytest.approx(
                output_error(weight, bias, refitted, moments), rel=1e-3, abs=1e-4
            )


def test_projections_estimate_the_error_of_a_wide_output() -> None:
    """The ridge is chosen on fewer outputs; it must be as good as one chosen on all of them."""
    values = correlated(300)
    _, _, choice = site()
    weight = torch.randn(8 * PROJECTIONS, NEURONS)
    fitted, held_out = gram_of(values[:40]), gram_of(values[40:])
    second_order = evidence_of(fitted, held_out)
    result, report = refit_best(weight, None, choice, second_order)
    exact = output_error(weight, None, result, second_order.held_out) / output_error(
        weight, None, choice, second_order.held_out
    )
    assert report.error == pytest.approx(exact, rel=0.2)


SINGULAR = {
    "fewer tokens than neurons": lambda: correlated(10),
    "dead neurons": lambda: correlated(200) * (torch.arange(NEURONS) % 3 > 0),
    "all constant": lambda: torch.full((50, NEURONS), 2.5),
    "all dead": lambda: torch.zeros(50, NEURONS),
    "extreme": lambda: torch.where(torch.rand(300, NEURONS) < 0.01, 6e4, correlated(300)),
    "twins": lambda: correlated(300)[:, torch.arange(NEURONS) // 2],
}


@pytest.mark.parametrize("name", SINGULAR)
def test_nothing_blows_up(name: str) -> None:
    values = SINGULAR[name]().half()
    weight, bias, choice = site()
    border = len(values) * 5 // 6
    fitted = gram_of(values[:border])
    held_out = GramAccumulator(fitted.pivot)
    held_out.add(values[border:])
    keep = eliminate(site_of(weight.shape[1]), weight, fitted.moments(), KEPT)
    rows = SecondOrderSplit(RawActivations(values[:border]), RawActivations(values[border:]), RawActivations(values))
    for second_order in (evidence_of(fitted, held_out), rows):
        result, report = refit_best(weight, bias, SitePlan(keep, choice.fill), second_order)
        assert result.weight is not None
        assert result.bias is not None
        assert bool(result.weight.isfinite().all())
        assert bool(result.bias.isfinite().all())
        assert result.weight.abs().max() < 100 * weight.abs().max()
        assert report.error <= 1, "worse than the pure fold on held-out tokens"


def test_ridge_below_float32_precision() -> None:
    """Two equal tokens and two equal neurons, one kept: the other is foretold, whatever the ridge."""
    rows = RawActivations(torch.tensor([[4096.0, 4096.0], [4096.0, 4096.0]]), is_centred=False)
    solve = rows.regress(torch.tensor([0]), torch.tensor([1]), torch.ones(1, 1))
    assert solve(1e-10).item() == pytest.approx(1)


def test_noise_is_not_fitted() -> None:
    """Independent neurons and few tokens: what the kept ones seem to say of the cut ones is chance."""
    weight, bias, choice = site()
    choice = SitePlan(choice.keep, torch.zeros(NEURONS))
    fitted, held_out = gram_of(torch.randn(20, NEURONS)), gram_of(torch.randn(4000, NEURONS))
    _, report = refit_best(weight, bias, choice, evidence_of(fitted, held_out))
    assert report.ridge is None or report.ridge >= 0.3


@pytest.mark.parametrize(
    "name", ["opt-mini", *(pytest.param(name, marks=pytest.mark.real) for name in ("llama-mini", "roberta-mini"))]
)
def test_the_refit_keeps_more_than_any_constant(name: str, tmp_path: Path, text: Path) -> None:
    """Cross-entropy on text that was not calibrated on; the margin is far above the noise between seeds."""
    results = {}
    for kind, options in (("peak", {}), ("mean", {"fill": "mean"}), ("refit", {"refit": True})):
        options = {"refit": False, "samples": 48, "calibration": str(text)} | options
        result = prune_peak.compress(str(EXAMPLES / name), 0.4, tmp_path / kind, **options)
        assert result.verification.passed
        results[kind] = result.quality_after.loss
    assert results["refit"] < min(results["peak"], results["mean"]) - 0.1, results


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mistral-window", "qwen2", "opt-350m"])
def test_a_refitted_checkpoint_obeys_the_law(name: str, tmp_path: Path, text: Path) -> None:
    """Host, shapes and copies, with the reader of the written folder put into the original."""
    source = tmp_path / "source"
    model = BY_NAME[name]
    type(model)(name, model.family, model.head, dict(model.settings) | {"vocab_size": 1024}).save(source)
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(source)
    result = compress(source, tmp_path / "cut", text, "--samples", 8, "--refit")
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())
    assert recipe["options"]["refit"] is True
    assert len(recipe["refits"]) == 3
    assert all(0 <= refit["error"] <= 1 for refit in recipe["refits"].values())
    assert "cached decoding" in str(recipe["verification"])
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(info.values())


def test_verify_detects_changed_copies(tmp_path: Path, text: Path) -> None:
    output = tmp_path / "cut"
    assert compress(EXAMPLES / "llama-mini", output, text, "--samples", 8, "--refit").exit_code == 0
    assert run("verify", output, "--original", EXAMPLES / "llama-mini", "-q").exit_code == 0
    tensors = load_file(output / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.1
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    assert run("verify", output, "--original", EXAMPLES / "llama-mini", "-q").exit_code == 3


def test_contradicting_options(tmp_path: Path, text: Path) -> None:
    score = compress(EXAMPLES / "opt-mini", tmp_path / "cut", text, "--no-refit", "--score", "elimination")
    assert score.exit_code == 2
    assert "Remove --no-refit" in score.stderr
