"""Narrow heads score as the whole ones do, where that is possible, and as nearly as any can, where not."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES
from tiny import BY_NAME
from torch import Tensor
from transformers import AutoModelForImageClassification

import prune_peak
from prune_peak.errors import UsageError
from prune_peak.models.loading import open_model
from prune_peak.sites.finding import find_sites
from prune_peak.sites.low_rank import project_rows, reduce_rank

HEADS, HEAD_DIM, HIDDEN, WIDTH = 3, 8, 16, 3


def make(rank: int) -> tuple[Tensor, Tensor]:
    """Weight and bias, side by side, of heads whose outputs have so many directions: (heads * head_dim, hidden + 1)."""
    parts = torch.randn(HEADS, HEAD_DIM, rank, dtype=torch.float64) @ torch.randn(HEADS, rank, HIDDEN + 1).double()
    both = parts.flatten(0, 1)
    return both[:, :HIDDEN], both[:, HIDDEN]


def by_head(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(heads, tokens, dimensions of a head)"""
    return (inputs @ weight.T + bias).unflatten(-1, (HEADS, -1)).transpose(0, 1)


def attend(inputs: Tensor, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    queries, keys = by_head(inputs, *query), by_head(inputs, *key)
    return (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)


def moments(inputs: Tensor, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    queries, keys = by_head(inputs, *query), by_head(inputs, *key)
    keys = keys - keys.mean(1, keepdim=True)
    return queries.mT @ queries / len(inputs), keys.mT @ keys / len(inputs)


@pytest.mark.parametrize("which", ["queries", "keys"])
def test_nothing_is_lost_where_the_rank_allows(which: str) -> None:
    """Also on inputs that were not seen, and with a bias of the keys that lies in none of their directions."""
    query, key = (make(WIDTH if which == part else HEAD_DIM) for part in ("queries", "keys"))
    key = (key[0], torch.randn(HEADS * HEAD_DIM, dtype=torch.float64))
    inputs, others = torch.randn(2, 500, HIDDEN, dtype=torch.float64)
    low_rank, lost = reduce_rank(*moments(inputs, query, key), WIDTH)
    assert lost < 1e-10
    assert low_rank.query.shape == low_rank.key.shape == (HEADS, WIDTH, HEAD_DIM)
    narrower = [tuple(project_rows(part, factors) for part in whole) for whole, factors in
                ((query, low_rank.query), (key, low_rank.key))]  # fmt: skip
    assert narrower[0][0].shape == (HEADS * WIDTH, HIDDEN)
    assert narrower[0][1].shape == (HEADS * WIDTH,)
    assert torch.allclose(attend(others, *narrower), attend(others, query, key), atol=1e-5)


def test_no_other_choice_loses_less() -> None:
    """Than the best subset of dimensions, or any projection near the chosen one; and what is said to be lost, is."""
    query, key = make(HEAD_DIM), make(HEAD_DIM)
    inputs = torch.randn(400, HIDDEN, dtype=torch.float64) @ torch.randn(HIDDEN, HIDDEN).double()
    low_rank, lost = reduce_rank(*moments(inputs, query, key), WIDTH)
    queries, keys = by_head(inputs, *query), by_head(inputs, *key)
    keys = keys - keys.mean(1, keepdim=True)

    def error(projection: Tensor) -> float:
        """Of the scores, as a share of their own variance over keys."""
        missing = (queries - queries @ projection.mT) @ keys.mT
        return (missing.square().sum() / (queries @ keys.mT).square().sum()).item()

    chosen = error(low_rank.projection())
    assert chosen == pytest.approx(lost, rel=1e-4)
    for kept in combinations(range(HEAD_DIM), WIDTH):
        subset = torch.zeros(HEAD_DIM, dtype=torch.float64)
        subset[list(kept)] = 1.0
        assert error(subset.diag().expand(HEADS, -1, -1)) > chosen
    for _ in range(20):
        moved = low_rank.key.double() + 0.01 * torch.randn(HEADS, WIDTH, HEAD_DIM).double()
        assert error(moved.mT @ low_rank.query.double() * (HEAD_DIM / WIDTH) ** 0.5) > chosen


@pytest.mark.parametrize(("ratio", "head_dim"), [pytest.param(0.25, 24, marks=pytest.mark.real), (0.5, 16)])
def test_a_trained_model_with_narrower_heads(ratio: float, head_dim: int, tmp_path: Path) -> None:
    digits = EXAMPLES / "digits"
    options = {"calibration": str(digits / "calibration"), "samples": 100, "evaluate": str(digits / "held-out")}
    results = {
        unit: prune_peak.compress(
            str(EXAMPLES / "vit-mini"), ratio, tmp_path / unit, sites=("attention",), unit=unit, **options
        )
        for unit in ("neuron", "head")
    }
    neurons, heads = results["neuron"], results["head"]
    assert neurons.verification.passed
    assert neurons.after.parameters == heads.after.parameters
    assert neurons.quality_after.loss < heads.quality_after.loss
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path / "neuron", output_loading_info=True)
    assert not any(info.values())
    assert (model.config.head_dim, model.config.num_attention_heads) == (head_dim, 4)
    sites = json.loads((tmp_path / "neuron" / "prune_peak.json").read_text())["sites"]
    assert {site["scores_lost"] for site in sites.values()} == set(neurons.scores_lost.values())
    assert all(0 < lost < 0.2 for lost in neurons.scores_lost.values())


def test_heads_that_cannot_be_narrower_are_refused(tmp_path: Path) -> None:
    for name in ("llama-tied", "bert"):
        source = open_model(str(BY_NAME[name].save(tmp_path / name)))
        with pytest.raises(UsageError, match="requires attention without rotary positions"):
            find_sites(source.meta_model, source.family, ["attention"], "neuron")
