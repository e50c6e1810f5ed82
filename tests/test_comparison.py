"""`evaluate`: numbers that can be trusted, side by side."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, look
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from tiny import BY_NAME
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_peak.cli.main import main
from prune_peak.evaluation import latency
from prune_peak.evaluation.comparison import compare, describe, evaluate
from prune_peak.evaluation.quality import IGNORED, PERPLEXITY, EvalSet, build_eval_set, evaluate_model
from prune_peak.models.loading import open_model


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, words), "-q"])


@torch.inference_mode()
def reference_perplexity(folder: Path, text: str, length: int, windows: int) -> float:
    """The loop that anybody would write."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer("")["input_ids"]  # BOS, where the tokenizer adds one
    body, losses = length - len(start), []
    for window in range(windows):
        ids = torch.tensor([start + tokens[window * body : (window + 1) * body]])
        losses += [model(ids, labels=ids).loss.item()]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture
def with_bos(tmp_path: Path) -> Path:
    """The example whose tokenizer puts BOS before a text."""
    folder = shutil.copytree(EXAMPLES / "llama-mini", tmp_path / "with-bos")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("name", "stride"), [("llama-mini", 64), ("opt-mini", 64), ("with-bos", 63)])
def test_perplexity_is_that_of_a_plain_loop(name: str, stride: int, with_bos: Path, text: Path) -> None:
    folder = with_bos if name == "with-bos" else EXAMPLES / name
    [comparison] = evaluate([str(folder)], data=text, windows=6, sequence_length=64, dtype="float32")
    expected = reference_perplexity(folder, text.read_text(), 64, 6)
    assert comparison.entries[0].quality.value == pytest.approx(expected, rel=1e-5)
    assert comparison.stride == stride
    assert ("<s> at the start of each, stride 63" in describe(comparison)) == (name == "with-bos")


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("padding", [0, 5])
def test_neither_batch_nor_padding_changes_it(size: int, padding: int) -> None:
    source = open_model(str(EXAMPLES / "llama-mini"))
    windows = torch.randint(source.config.vocab_size, (7, 24))
    expected = evaluate_model(source, build_eval_set(source, windows, "noise"))
    padded = torch.nn.functional.pad(windows, (0, padding))
    mask = torch.nn.functional.pad(torch.ones_like(windows), (0, padding))
    targets = torch.nn.functional.pad(windows[:, 1:], (0, padding + 1), value=IGNORED)
    batches = [
        {"input_ids": ids, "attention_mask": real}
        for ids, real in zip(padded.split(size), mask.split(size), strict=True)
    ]
    seen = evaluate_model(source, EvalSet(PERPLEXITY, "noise", batches, targets.split(size)))
    torch.testing.assert_close(seen.losses, expected.losses, rtol=1e-5, atol=0)
    assert torch.equal(seen.hits, expected.hits)


def test_the_paired_test() -> None:
    """Right about no difference, about a sure one, and one time in twenty where there is only chance."""
    values = torch.randn(24, dtype=torch.float64)
    assert compare(values, values).p == 1
    assert compare(values, values + 0.01).p == pytest.approx(1 / 10_001)
    assert compare(values, values - 0.01).mean == pytest.approx(-0.01)
    assert compare(values[:1], values[1:2]).p is None
    chance = [compare(torch.zeros(12), torch.randn(12)).p for _ in range(200)]
    assert 2 <= sum(p < 0.05 for p in chance) <= 20
    noise = compare(values, values + torch.randn(24))
    assert noise.p == pytest.approx(math.erfc(abs(noise.mean / noise.standard_error) / 2**0.5), abs=0.03)


def test_models_side_by_side(tmp_path: Path, text: Path) -> None:
    worse = AutoModelForCausalLM.from_pretrained(EXAMPLES / "llama-mini")
    worse.model.layers[1].mlp.down_proj.weight.data.zero_()
    worse.save_pretrained(tmp_path / "worse")
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(tmp_path / "worse")
    words = (EXAMPLES / "llama-mini", tmp_path / "worse", "--data", text, "--windows", 8, "--sequence-length", 32)
    table = run(*words)
    assert table.exit_code == 0, table.output
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["llama-mini", "worse"]
    protocol = "8 non-overlapping windows of 32 tokens, 248 predicted, float32"
    assert f"on text.txt: {protocol} (no special token at the start of each, stride 32); ±" in table.stdout
    entries = json.loads(run(*words, "--json").stdout)["comparisons"][0]["entries"]
    first, second = (entry["quality"] for entry in entries)
    assert entries[0]["loss"] is None
    assert entries[1]["loss"]["mean"] == pytest.approx(second["loss"] - first["loss"])
    assert entries[1]["loss"]["p"] < 0.05
    assert f"{second['value'] / first['value']:.3f}" in table.stdout
    # window by window the models err alike, so the difference is surer than either number
    assert entries[1]["loss"]["standard_error"] < second["loss_error"]


def test_a_masked_model(text: Path) -> None:
    done = run(EXAMPLES / "roberta-mini", "--data", text, "--windows", 4, "--sequence-length", 32)
    assert done.exit_code == 0, done.output
    assert "masked-token accuracy, %" in done.stdout
    assert "perplexity" not in done.stdout.lower()


def test_an_image_model() -> None:
    pytest.importorskip("PIL")
    images = EXAMPLES / "digits" / "held-out"
    done = run(EXAMPLES / "vit-mini", EXAMPLES / "vit-mini", "--data", images)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    [accuracy] = [float(line[3]) for line in lines if line[:3] == ["image", "accuracy,", "%"]]
    assert 80 < accuracy <= 100
    assert "Image accuracy on held-out: " in done.stdout
    assert done.stdout.count("p = 1.0000") == 2


def test_the_page_shows_answers_side_by_side(text: Path, tmp_path: Path) -> None:
    """Also of two folders of one name; what is written is shown as text, whatever it says."""
    page, prompts = tmp_path / "page.html", tmp_path / "prompts.txt"
    prompts.write_text("What is <b>bold</b>?\n")
    folder = EXAMPLES / "llama-mini"
    words = (folder, folder, "--data", text, "--windows", 2, "--sequence-length", 32, "--prompts", prompts)
    done = run(*words, "--report", page)
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"Written to {page}.\n")
    shown = page.read_text()
    [conclusion] = re.findall(r'<p class="conclusion">(.*?)</p>', shown)
    assert re.fullmatch(
        r"llama-mini, beside llama-mini: \+0\.0% parameters, perplexity .*, \d of 1 answers .*", conclusion
    )
    assert "llama-mini (1)</th>" in shown
    assert "llama-mini (2)</th>" in shown
    assert "What is &lt;b&gt;bold&lt;/b&gt;?</td>" in shown
    assert f"--prompts {prompts}" in shown
    if CHROMIUM is not None:
        seen = look(page, 500)
        assert seen["wide"] <= 0 == seen["entries"]
        assert seen["title"] == "llama-mini and llama-mini"
    again = run(*words, "--report", page)
    assert again.exit_code == 2
    assert f"--report {page}: expected a file that does not exist" in again.stderr


REFUSED = {
    "nothing": ([], 2, "nothing to measure; pass --data DATA, --talk, --latency"),
    "no window": (["--data", "TEXT", "--windows", "0"], 2, "--windows 0: expected at least 1."),
    "another's tokens": (["BOS", "--data", "TEXT"], 1, "into different tokens, pixels or labels"),
    "no text": (["CLASSIFIER", "--data", "TEXT"], 1, "which predicts no text to evaluate"),
    "no decoder": (["CLASSIFIER", "--latency"], 1, "which generates no text to time"),
    "short text": (["--data", "SHORT"], 1, "fewer than one window"),
}


@pytest.mark.parametrize(("words", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused(
    words: list[str], code: int, message: str, tmp_path: Path, text: Path, with_bos: Path
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    classifier = tmp_path / "classifier"
    if "CLASSIFIER" in words:
        BY_NAME["llama-classifier"].save(classifier)
    names = {"TEXT": text, "SHORT": tmp_path / "short.txt", "CLASSIFIER": classifier, "BOS": with_bos}
    done = run(EXAMPLES / "llama-mini", *(names.get(word, word) for word in words))
    assert done.exit_code == code, done.output
    assert message in done.stderr


@pytest.mark.real
def test_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)
    done = run(EXAMPLES / "llama-mini", "--latency", "--json")
    assert done.exit_code == 0, done.output
    [speed] = json.loads(done.stdout)["latency"]
    assert speed["prefill"] > speed["decode"] > 0
    assert speed["memory"] > 100e6
    assert speed["prompt"] == 128 - 32  # the positions that the model has, less those that it decodes


TASK = """
task: mini
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # the harness and its libraries have many
def test_tasks_of_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": "The function", "choices": [" is", " zq"], "answer": 0} for _ in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "mini.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    done = run(EXAMPLES / "llama-mini", EXAMPLES / "opt-mini", "--tasks", tmp_path / "mini.yaml", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout[done.stdout.index("{") :])["tasks"]
    assert [scores["model"] for scores in answer] == ["llama-mini", "opt-mini"]
    assert all(scores["tasks"]["mini"]["acc"] == 1.0 for scores in answer)
    unknown = run(EXAMPLES / "llama-mini", "--tasks", "no_such_task")
    assert unknown.exit_code == 2
    assert "lm-evaluation-harness has no such task" in unknown.stderr
    offline = run(EXAMPLES / "llama-mini", "--tasks", "arc_easy")
    assert offline.exit_code == 1
    assert "--tasks arc_easy: their data cannot be loaded" in offline.stderr
