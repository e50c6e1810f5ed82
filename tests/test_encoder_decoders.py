"""Encoder-decoders: both lists of blocks are pruned, by pairs of what is read and what is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import EXAMPLES
from train_mini import count_spelled
from transformers import PreTrainedModel

import prune_peak
from prune_peak.data.pairs import answer, read_pairs
from prune_peak.data.windows import PADDING, into_batches
from prune_peak.errors import PrunePeakError
from prune_peak.evaluation.quality import build_given_eval_set, evaluate_model
from prune_peak.models.loading import open_model
from prune_peak.models.miniature import randomize
from prune_peak.sites.finding import find_sites
from prune_peak.stats.collection import collect

SIZES = {"d_model": 16, "vocab_size": 1024, "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 3}


def _save(model: PreTrainedModel, folder: Path) -> Path:
    randomize(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLES / "llama-mini" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BART whose decoder is deeper and has wider MLPs than its encoder."""
    config = transformers.BartConfig(
        **SIZES,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=48,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
        forced_eos_token_id=None,
    )
    return _save(transformers.BartForConditionalGeneration(config), tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5; one width holds for the MLPs of both lists of blocks."""
    config = transformers.T5Config(**SIZES, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return _save(transformers.T5ForConditionalGeneration(config), tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of several lengths, each with a target."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"text": f"add {n} to {n * n}", "target": f"the sum is {n + n * n}"} for n in range(1, 60)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def test_both_stacks_of_bart_are_pruned_by_pairs(bart: Path, rows: Path, tmp_path: Path) -> None:
    """The law holds in one pass and in cached decoding; the widths may differ; the stock class generates."""
    options = {"calibration": str(rows), "samples": 24, "sequence_length": 24}
    result = prune_peak.compress(str(bart), 0.5, tmp_path / "out", **options)
    checks = [check["check"] for check in result.verification.checks]
    assert result.verification.passed
    assert "same function in float32, cached decoding" in checks
    assert "same function in float32, encoder last hidden state 1" in checks
    written = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert (written.config.encoder_ffn_dim, written.config.decoder_ffn_dim) == (16, 24)
    assert result.quality_before is not None
    assert result.quality_before.metric == "perplexity"
    assert written.generate(torch.tensor([[5, 6, 7, 3]]), max_new_tokens=4).shape[1] > 1
    [comparison] = prune_peak.evaluate([str(bart), str(tmp_path / "out")], str(rows), sequence_length=24, windows=4)
    assert comparison.entries[1].loss is not None
    with pytest.raises(PrunePeakError, match="a BartForConditionalGeneration; heal does not support encoder-decoders"):
        prune_peak.heal(tmp_path / "out", original=str(bart))


def test_t5_is_pruned_by_text_without_targets(t5: Path, text: Path, tmp_path: Path) -> None:
    """Its decoder reads what it writes itself. One width is kept in both lists of blocks."""
    options = {"calibration": str(text), "samples": 8, "sequence_length": 32, "refit": False}
    result = prune_peak.compress(str(t5), 0.25, tmp_path / "out", **options)
    assert result.verification.passed
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.d_ff == 24
    assert len(json.loads((tmp_path / "out" / "prune_peak.json").read_text())["sites"]) == 4


def test_pairs_are_what_the_class_makes_of_labels(bart: Path, rows: Path) -> None:
    model = open_model(str(bart))
    tokenizer = transformers.AutoTokenizer.from_pretrained(bart)
    pairs = read_pairs(str(rows), model, 24)
    labels = tokenizer(text_target="the sum is 12", return_tensors="pt")["input_ids"]
    expected = model.meta_model.prepare_decoder_input_ids_from_labels(labels)[0]
    decoded = pairs[2, 1][pairs[2, 1] != PADDING]
    assert torch.equal(decoded, torch.cat([expected, labels[0, -1:]]))
    assert torch.equal(pairs[2, 0][pairs[2, 0] != PADDING], torch.tensor(tokenizer("add 3 to 9")["input_ids"]))
    eval_set = build_given_eval_set(model, [str(rows)], 24, windows=4)
    assert torch.equal(eval_set.targets[2][0, :-1], labels[0])
    stock = transformers.BartForConditionalGeneration.from_pretrained(bart).eval()
    with torch.no_grad():
        loss = stock(input_ids=torch.tensor([tokenizer("add 3 to 9")["input_ids"]]), labels=labels).loss
    assert evaluate_model(model, eval_set).losses[2].item() == pytest.approx(loss.item(), rel=1e-5)


def test_padding_is_masked_and_not_counted(bart: Path) -> None:
    """What a batch computes is what its pairs compute alone; statistics count the tokens of each list of blocks."""
    pairs = torch.full((2, 2, 8), PADDING)
    pairs[0, 0, :6], pairs[0, 1, :3] = torch.arange(10, 16), torch.arange(20, 23)
    pairs[1, 0, :4], pairs[1, 1, :5] = torch.arange(30, 34), torch.arange(40, 45)
    [batch] = into_batches(pairs)
    model = open_model(str(bart))
    stock = model.load(torch.float32)
    with torch.no_grad():
        together = stock(**batch).logits
        for pair, logits, length in zip(pairs, together, (3, 5), strict=True):
            [alone] = into_batches(pair[None])
            assert "attention_mask" not in alone
            torch.testing.assert_close(stock(**alone).logits[0], logits[:length], rtol=1e-4, atol=1e-5)
    found = find_sites(model.meta_model, model.family)
    counts = [each.stats.count for each in collect(model, found, [batch], torch.float32)]
    assert counts == [10, 8, 8]


def test_targets_of_its_own_are_its_greedy_output(bart: Path) -> None:
    model = open_model(str(bart))
    pairs = torch.full((3, 2, 12), PADDING)
    pairs[:, 0] = torch.arange(5, 41).view(3, 12)
    [answered] = answer(model, pairs)
    stock = model.load(torch.float32)
    with torch.no_grad():
        for pair in answered:
            read, written = pair[0], pair[1][pair[1] != PADDING]
            assert int(written[0]) == 2
            greedy = stock(input_ids=read[None], decoder_input_ids=written[None]).logits[0].argmax(-1)
            assert torch.equal(greedy[:-1], written[1:])
    mixed = answered.clone()
    mixed[1, 1] = PADDING
    mixed[0, 1, 1:3] = 7
    again = answer(model, mixed)[0]
    assert torch.equal(again[0], mixed[0])  # those with targets stay
    assert torch.equal(again[1], answered[1])


def test_what_an_encoder_decoder_does_not_do_is_refused(bart: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(PrunePeakError, match="writes only what a text asks for; pass a text"):
        prune_peak.compress(str(bart), 0.5, tmp_path / "out", samples=8, sequence_length=32)
    with pytest.raises(PrunePeakError, match="has no targets; expected rows with a text and a target"):
        prune_peak.evaluate([str(bart)], str(text), sequence_length=32)


def test_one_stack_is_chosen(bart: Path, rows: Path, tmp_path: Path) -> None:
    """The other one is copied, and named as left whole; where both share a width, the choice is refused."""
    inspection = prune_peak.inspect(str(bart), 0.5)
    assert inspection.stacks == {"encoder": 1, "decoder": 2}
    assert [(site.neurons, site.kept) for site in inspection.sites] == [(32, 16)]
    only = prune_peak.inspect(str(bart), 0.5, stack="decoder")
    assert [(site.neurons, site.kept) for site in only.sites] == [(48, 24)]
    assert "stack does not name it" in only.unprunable["left whole: encoder.layers"]
    options = {"calibration": str(rows), "samples": 8, "sequence_length": 24, "refit": False}
    result = prune_peak.compress(str(bart), 0.5, tmp_path / "out", stack="decoder", **options)
    assert result.before.neurons["mlp"] == 96
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (32, 24)
    assert prune_peak.verify(tmp_path / "out", open_model(str(bart))).passed
    with pytest.raises(PrunePeakError, match="expected encoder, decoder, or several"):
        prune_peak.inspect(str(bart), 0.5, stack="text")


@pytest.mark.real
def test_the_trained_example_still_spells(tmp_path: Path) -> None:
    """Three of four neurons, deleted by magnitude, take most of its numbers; with constants and refit, few."""
    numbers = [json.loads(row)["text"] for row in (EXAMPLES / "numbers" / "held-out.jsonl").read_text().splitlines()]
    few = list(map(int, numbers[:60]))
    options = {"calibration": str(EXAMPLES / "numbers" / "calibration.jsonl"), "samples": 200, "sequence_length": 16}
    deletion = {"score": "weight-norm", "fill": "zero", "refit": False}
    right = []
    for way in ({}, deletion):
        prune_peak.compress(str(EXAMPLES / "bart-mini"), 0.75, tmp_path / "out", force=True, **options, **way)
        written = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
        right.append(count_spelled(written, transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), few))
    assert right[0] >= 50 > 40 > right[1]


def test_stacks_with_one_width_are_pruned_together(t5: Path) -> None:
    with pytest.raises(PrunePeakError, match="has one d_ff for encoder and decoder"):
        prune_peak.inspect(str(t5), 0.25, stack=("encoder",))
