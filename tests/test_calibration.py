"""Statistics files, and the texts of a calibration."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_compress import compress, digests, run

from prune_peak.data.sampling import draw_windows
from prune_peak.data.self_generated import Draw, generate_tokens, generate_windows
from prune_peak.data.texts import load_tokenizer, read_texts, special_tokens, tokenize_text
from prune_peak.data.windows import into_batches
from prune_peak.errors import PrunePeakError
from prune_peak.io.tensor_files import TensorFile, stream_tensors
from prune_peak.models.execution import ExecutionConfig
from prune_peak.models.loading import open_model
from prune_peak.options import ELIMINATION, FREQUENCY, RANDOM, REAP, SCORES
from prune_peak.pruning.site_pruning import select
from prune_peak.sites.finding import find_sites
from prune_peak.stats.calibration import calibrate
from prune_peak.stats.collection import collect


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_statistics_file_matches_direct_run(ratio: float, tmp_path: Path, text: Path) -> None:
    model, stats = EXAMPLES / "llama-mini", tmp_path / "kept.stats"
    result = run(
        "calibrate", "--model", model, "--output", stats, "--calibration", text, "--samples", 8, "-q", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 8 * 128
    common = ("compress", "--model", model, "--ratio", ratio, "--no-refit", "-q")
    direct = run(*common, "--output", tmp_path / "direct", "--calibration", text, "--samples", 8)
    kept = run(*common, "--output", tmp_path / "kept", "--stats", stats)
    assert direct.exit_code == kept.exit_code == 0, direct.output + kept.output
    assert digests(tmp_path / "direct") == digests(tmp_path / "kept")


# options that need covariances: model, calibration, options
WITH_COVARIANCES = {
    "the refit": ("llama-mini", ["--samples", 8], ["--ratio", 0.3]),
    "few tokens": ("llama-mini", ["--samples", 2], ["--ratio", 0.3]),
    "automatic fill": (
        "llama-mini",
        ["--samples", 8],
        ["--ratio", "mlp=0.2,attention=0.5", "--fill", "auto", "--no-refit"],
    ),
    "target over two kinds": (
        "llama-mini",
        ["--samples", 8],
        ["--target-params", 0.9, "--sites", "mlp,attention", "--no-refit"],
    ),
    "keep shape": (
        "opt-mini",
        ["--samples", 8],
        ["--ratio", 0.3, "--sites", "attention", "--keep-shape", "--unit", "neuron"],
    ),
    "narrower heads": (
        "vit-mini",
        ["--samples", 40],
        ["--ratio", 0.5, "--sites", "attention", "--unit", "neuron", "--no-refit"],
    ),
}


@pytest.mark.parametrize("case", WITH_COVARIANCES)
def test_covariances_file_matches_direct_run(case: str, tmp_path: Path, text: Path) -> None:
    name, calibration, options = WITH_COVARIANCES[case]
    model = EXAMPLES / name
    calibration = ["--calibration", EXAMPLES / "digits" / "calibration" if name == "vit-mini" else text, *calibration]
    for stats, more in ((tmp_path / "plain.stats", []), (tmp_path / "covariances.stats", ["--covariances"])):
        made = run("calibrate", "--model", model, "--output", stats, *calibration, *more, "-q")
        assert made.exit_code == 0, made.output
    common = ("compress", "--model", model, *options, "-q", "--output")
    direct = run(*common, tmp_path / "direct", *calibration)
    kept = run(*common, tmp_path / "kept", "--stats", tmp_path / "covariances.stats")
    assert direct.exit_code == kept.exit_code == 0, direct.output + kept.output
    assert digests(tmp_path / "direct") == digests(tmp_path / "kept")
    refused = run(*common, tmp_path / "refused", "--stats", tmp_path / "plain.stats")
    assert refused.exit_code == 1
    assert "calibrate --covariances" in refused.stderr
    estimate = run(*common, tmp_path / "estimate", "--stats", tmp_path / "covariances.stats", "--dry-run", "--json")
    assert estimate.exit_code == 0, estimate.output
    assert 0 < json.loads(estimate.stdout)["minutes"] < 5


def test_incomplete_statistics_file(tmp_path: Path, text: Path) -> None:
    stats, model = tmp_path / "kept.stats", EXAMPLES / "llama-mini"
    words = ("--output", stats, "--calibration", text, "--samples", 4, "--covariances")
    assert run("calibrate", "--model", model, *words, "-q").exit_code == 0
    with safe_open(stats, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(stats)
    del tensors["model.layers.1.mlp.down_proj/gram/held_out/products"]
    save_file(tensors, stats, metadata)
    result = compress(model, tmp_path / "cut", text, "--refit", "--stats", stats)
    assert result.exit_code == 1
    assert "does not hold all of model.layers.1.mlp.down_proj" in result.stderr
    assert not (tmp_path / "cut.partial").exists()


def test_statistics_file_sets_no_compress_options(tmp_path: Path, text: Path) -> None:
    """Options of `compress` in the metadata of a statistics file are ignored."""
    stats, model = tmp_path / "kept.stats", EXAMPLES / "llama-mini"
    words = ("--output", stats, "--calibration", text, "--samples", 4, "-q")
    assert run("calibrate", "--model", model, *words).exit_code == 0
    with safe_open(stats, framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["prune_peak_statistics"])
    about["options"] |= {"refit": True, "x; rm y #": 1}
    save_file(load_file(stats), stats, metadata | {"prune_peak_statistics": json.dumps(about)})
    assert compress(model, tmp_path / "cut", text, "--stats", stats).exit_code == 0
    options = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())["options"]
    assert options["refit"] is False
    assert "x; rm y #" not in options


def test_full_disk_leaves_no_file(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first", torch.ones(3, dtype=torch.bfloat16)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        stream_tensors(tensors(), tmp_path / "some.stats", {}, 1000)
    assert not list(tmp_path.iterdir())


def test_streamed_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.ones(0, 4, dtype=torch.int64),
        "matrix/a": torch.randn(5, 3),
        "matrix/b": torch.randn(3, 5).T,
    }
    stream_tensors(tensors.items(), tmp_path / "some.stats", {"key": "value"}, 1000)
    for read in (load_file(tmp_path / "some.stats"), TensorFile(tmp_path / "some.stats").read("")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
    file = TensorFile(tmp_path / "some.stats")
    assert file.metadata == {"key": "value"}
    assert file.read("matrix/").keys() == {"a", "b"}
    with pytest.raises(ValueError, match="header takes"):
        stream_tensors(tensors.items(), tmp_path / "other.stats", {}, 100)


def test_statistics_of_another_model(tmp_path: Path, text: Path) -> None:
    stats = tmp_path / "kept.stats"
    made = run("calibrate", "--model", EXAMPLES / "opt-mini", "--output", stats, "--calibration", text, "--samples", 4)
    assert made.exit_code == 0, made.output
    again = run("calibrate", "--model", EXAMPLES / "opt-mini", "--output", stats, "--calibration", text)
    assert "--force" in again.stderr
    result = compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, "--stats", stats)
    assert result.exit_code == 1
    assert "statistics of another model" in result.stderr


def test_invalid_statistics_files(tmp_path: Path, text: Path) -> None:
    bad = tmp_path / "bad.stats"
    for damage in ("missing", "text", "other"):
        if damage == "text":
            bad.write_text("not statistics")
        elif damage == "other":
            save_file({"a": torch.ones(1)}, bad)
        result = compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, "--stats", bad)
        assert result.exit_code == 1, damage
        assert result.stderr.startswith("Error: ")
    assert not (tmp_path / "cut").exists()


def test_statistics_need_no_tokenizer(tmp_path: Path, text: Path) -> None:
    """A run by statistics reads no text; it ends without the tokenizer, and names none."""
    model = shutil.copytree(EXAMPLES / "llama-mini", tmp_path / "model")
    statistics = tmp_path / "model.stats"
    calibrate(str(model), statistics, calibration=str(text), samples=2, sequence_length=32)
    for path in model.glob("tokenizer*"):
        path.unlink()
    result = compress(model, tmp_path / "cut", text, "--stats", statistics)
    assert result.exit_code == 0, result.stderr
    assert "okenizer" not in result.stdout
    assert "from_pretrained" in result.stdout


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one two"}\n{"text": "three", "other": 1}\n')
    assert read_texts(str(path)) == ["one two", "three"]
    tokenizer = load_tokenizer(open_model(str(EXAMPLES / "opt-mini")))
    tokens = tokenize_text(str(path), tokenizer, 2).flatten().tolist()
    ends = [number for number, token in enumerate(tokens) if token == tokenizer.eos_token_id]
    assert len(ends) >= 1
    assert tokens[: ends[0]] == tokenizer("one two")["input_ids"]


@pytest.mark.parametrize("line", ["no json", '{"txt": "a"}', '{"text": 3}', "[1]"])
def test_invalid_json_lines(line: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(PrunePeakError, match="line 2"):
        read_texts(str(path))


def test_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_texts(str(folder)) == ["one", "two"]


@pytest.mark.parametrize("characters", [1, 8])
def test_a_text_is_tokenized_as_far_as_it_is_used(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    """The same windows as of the whole text; a text with more characters a token than foreseen is tokenized again."""
    monkeypatch.setattr("prune_peak.data.texts.CHARACTERS", characters)
    long = tmp_path / "long.txt"
    long.write_text(text.read_text() * 4)
    tokenizer = load_tokenizer(open_model(str(EXAMPLES / "llama-mini")))
    whole = tokenize_text(str(long), tokenizer, 32)
    sizes: list[int] = []
    encode = type(tokenizer).__call__

    def counting(self: Any, text: str, **options: Any) -> Any:
        sizes.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    assert torch.equal(tokenize_text(str(long), tokenizer, 32, most=3), whole[:3])
    used = [size for size in sizes if size > 1]
    assert max(used) < len(long.read_text()) if characters == 8 else used == [128, len(long.read_text())]


def test_windows_begin_with_bos(tmp_path: Path, text: Path) -> None:
    tokenizer = load_tokenizer(open_model(str(EXAMPLES / "llama-mini")))
    assert special_tokens(tokenizer) == ([], [])
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert special_tokens(tokenizer) == ([0], [])
    windows = tokenize_text(str(text), tokenizer, 32)
    assert windows.shape[1] == 32
    assert bool((windows[:, 0] == 0).all())


def test_self_generated_text_has_passages_of_ordinary_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_peak.data.self_generated.PASSAGE", 8)
    source = open_model(str(EXAMPLES / "llama-mini"))
    windows = generate_windows(source, 12, 20, seed=3).calibration
    assert windows.shape == (12, 20)
    starts = torch.zeros(20, dtype=torch.bool)
    starts[[0, 8, 16]] = True
    assert bool((windows[:, starts] == 0).all())  # BOS
    assert bool((windows[:, ~starts] > 1).all())  # neither BOS nor EOS


@pytest.mark.parametrize("vocabulary", [7, 256, 700])
def test_draws_have_the_probabilities_of_the_model(vocabulary: int) -> None:
    """Evenly spaced random numbers take every token as often as its probability says, to one draw."""
    draws = 20_000
    numbers = torch.stack([torch.zeros(draws), torch.arange(draws) / draws], dim=1)
    is_ordinary = torch.ones(vocabulary, dtype=torch.bool)
    is_ordinary[[0, vocabulary - 1]] = False
    logits = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    drawn = Draw(numbers, is_ordinary)(torch.zeros(draws, 2), logits.repeat(draws, 1)).argmax(1)
    expected = logits.masked_fill(~is_ordinary, -torch.inf).softmax(0) * draws
    assert (drawn.bincount(minlength=vocabulary) - expected).abs().max() < 2
    assert bool(is_ordinary[drawn].all())


def test_self_generated_text_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(EXAMPLES / "llama-mini"))
    texts = [generate_tokens(source, 6, 24, 5, ExecutionConfig(passages=passages)) for passages in (64, 4)]
    assert torch.equal(*texts)
    with monkeypatch.context() as patched:  # with the layers that transformers makes
        patched.setattr("prune_peak.data.self_generated.DynamicLayer", None)
        assert torch.equal(texts[0], generate_tokens(source, 6, 24, 5))


def test_passages_that_loop_are_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(EXAMPLES / "llama-mini"))
    first = generate_tokens(source, 6, 24, 5)
    loop = first[2].tolist()
    monkeypatch.setattr("prune_peak.data.self_generated.is_loop", lambda tokens: tokens == loop)
    again = generate_tokens(source, 6, 24, 5)
    assert [torch.equal(*pair) for pair in zip(first, again, strict=True)] == [True, True, False, True, True, True]


def test_self_generation_needs_a_causal_model(tmp_path: Path) -> None:
    with pytest.raises(PrunePeakError, match="a RobertaForMaskedLM, which generates no text"):
        generate_windows(open_model(str(EXAMPLES / "roberta-mini")), 2, 16, seed=0)
    with pytest.raises(PrunePeakError, match="expected at least 3"):
        generate_windows(open_model(str(EXAMPLES / "llama-mini")), 2, 2, seed=0)


def test_self_generated_text_begins_with_bos() -> None:
    source = open_model(str(EXAMPLES / "llama-mini"))
    windows = generate_windows(source, 12, 16, seed=3)
    assert windows.calibration.shape == (12, 16)
    assert windows.held_out.shape == (1, 16)
    assert bool((windows.calibration[:, 0] == 0).all())
    assert bool((windows.calibration[:, 1] > 1).all())  # neither BOS nor padding
    assert len(set(windows.calibration[:, 1].tolist())) > 6
    assert not torch.equal(windows.calibration, generate_windows(source, 12, 16, seed=4).calibration)


def test_scores_keep_different_neurons(tmp_path: Path, text: Path) -> None:
    source = open_model(str(EXAMPLES / "llama-mini"))
    [site, *_] = find_sites(source.meta_model, source.family)
    windows = draw_windows(source, str(text), 8, 128, seed=0).calibration
    [observed] = collect(source, [site], into_batches(windows), torch.float32)
    summary, weight = observed.stats.summarize(), source.read(site.weight)

    def keep(score: str, seed: int = 0) -> list[int]:
        kept: list[int] = select(site, summary, weight, 272, "mean", score, seed).keep.tolist()
        return kept

    keeps = {score: keep(score) for score in SCORES if score not in (ELIMINATION, REAP, FREQUENCY)}
    assert all((keep(score, seed=1) == kept) == (score != RANDOM) for score, kept in keeps.items())
    assert keeps["deviation"] == keeps["variance"]  # about the mean they are the same
    assert len({tuple(kept) for kept in keeps.values()}) == len(keeps) - 1
    words = ("--samples", 8, "--score", "weight-norm", "--fill", "mean")
    assert compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, *words).exit_code == 0
    plan = load_file(tmp_path / "cut" / "prune_peak_plan.safetensors")
    assert plan[f"{site.name}.keep"].tolist() == keeps["weight-norm"]
