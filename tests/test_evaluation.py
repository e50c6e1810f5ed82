"""Exams: what is asked, and that the grades are those of a plain loop over the stock model."""

import math
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES
from tiny import Tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from prune_peak.data.texts import read_windows
from prune_peak.evaluation.quality import (
    IGNORED,
    LOGITS_AT_ONCE,
    MASKED_ACCURACY,
    PERPLEXITY,
    build_eval_set,
    is_evaluable,
    measure_quality,
    score_logits,
)
from prune_peak.models.loading import Model, open_model


@torch.inference_mode()
def test_perplexity_is_that_of_a_plain_loop(text: Path) -> None:
    source = open_model(str(EXAMPLES / "llama-mini"))
    windows = read_windows(str(text), source, 64)[:5]
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    losses = torch.stack([model(input_ids=window, labels=window).loss for window in windows.split(1)])
    logits = model(windows).logits[:, :-1]
    quality = measure_quality(source, build_eval_set(source, windows, "text"))
    assert quality.metric == PERPLEXITY
    assert quality.value == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert quality.standard_error == pytest.approx(quality.value * losses.std().item() / 5**0.5, rel=1e-4)
    assert quality.accuracy == pytest.approx((logits.argmax(-1) == windows[:, 1:]).float().mean().item())
    assert (quality.windows, quality.length, quality.tokens) == (5, 64, 5 * 63)


def test_grades_are_those_of_all_logits_at_once() -> None:
    logits, targets = torch.randn(3, 50, 20_000), torch.randint(20_000, (3, 50))
    logits[:, ::3].scatter_(2, targets[:, ::3, None], 9.0)  # the answers that are right
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    targets[:, -1] = IGNORED
    scores = score_logits(logits, targets)
    assert logits[0].numel() > 2 * LOGITS_AT_ONCE
    torch.testing.assert_close(scores.losses, losses[:, :-1].double().mean(1))
    torch.testing.assert_close(scores.hits, torch.full((3,), 17 / 49, dtype=torch.float64))


@pytest.fixture
def masked_lm() -> Model:
    return open_model(str(EXAMPLES / "roberta-mini"))


@torch.inference_mode()
def test_masked_tokens_are_predicted_as_by_a_plain_loop(masked_lm: Model, text: Path) -> None:
    windows = read_windows(str(text), masked_lm, 64)[:5]
    eval_set = build_eval_set(masked_lm, windows, "text")
    inputs = torch.cat([batch["input_ids"] for batch in eval_set.batches])
    targets = torch.cat(list(eval_set.targets))
    logits = AutoModelForMaskedLM.from_pretrained(masked_lm.folder)(inputs).logits
    quality = measure_quality(masked_lm, eval_set)
    assert quality.metric == MASKED_ACCURACY
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert quality.loss == pytest.approx(loss.item(), rel=1e-5)
    asked = targets != IGNORED
    assert (
        quality.value == quality.accuracy == pytest.approx((logits.argmax(-1) == windows)[asked].float().mean().item())
    )
    assert quality.tokens == asked.sum()


def test_a_fixed_share_of_ordinary_tokens_is_masked(masked_lm: Model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(masked_lm.folder)
    windows = torch.randint(10, 260, (4, 62))
    ends = [torch.full((4, 1), token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    windows = torch.cat([ends[0], windows, ends[1]], dim=1)
    eval_set, again = (build_eval_set(masked_lm, windows, "text") for _ in range(2))
    places = []
    for window, batch, targets in zip(windows, eval_set.batches, eval_set.targets, strict=True):
        asked = targets[0] != IGNORED
        assert asked.sum() == round(0.15 * 62)
        assert not asked[[0, -1]].any()
        assert torch.equal(targets[0][asked], window[asked])
        assert (batch["input_ids"][0][asked] == tokenizer.mask_token_id).all()
        assert torch.equal(batch["input_ids"][0][~asked], window[~asked])
        places.append(asked)
    assert not torch.equal(places[0], places[1])
    assert all(torch.equal(*pair) for pair in zip(eval_set.targets, again.targets, strict=True))


def test_model_without_a_language_head_is_not_evaluable(tmp_path: Path) -> None:
    assert is_evaluable(open_model(str(EXAMPLES / "opt-mini")))
    assert not is_evaluable(open_model(str(Tiny("base", "Llama", "Model").save(tmp_path / "base"))))
