"""The model card: its fields, its numbers, and that what it says can be done."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from browser import CHROMIUM, dump
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTImageProcessorPil
from valid import VIT

import prune_peak
from prune_peak.cli.main import main
from prune_peak.export.card import find_task, write_card
from prune_peak.models.loading import open_model

FRONT_MATTER = "---\nlicense: other\nlicense_name: mini\nlanguage:\n- en\ndownloads: 3\n---\nThe source's own words.\n"

# Only the card's own picture may be fetched; whatever else it asks for is told
WATCH = """<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src file:; script-src 'unsafe-inline'">
<script>
addEventListener("securitypolicyviolation", event => document.body.dataset.refused = event.blockedURI);
addEventListener("load", () => document.body.append("width " + document.images[0].naturalWidth));
</script>
"""


def compress(*words: object) -> Result:
    return CliRunner().invoke(main, ["compress", *map(str, words), "-q"])


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name nobody else need know; it holds a model and a text."""
    folder = tmp_path_factory.mktemp("private-directory")
    shutil.copytree(EXAMPLES / "llama-mini", folder / "my llama")
    (folder / "my llama" / "README.md").write_text(FRONT_MATTER)
    (folder / "my notes.txt").write_text((Path(__file__).parent / "test_law.py").read_text())
    return folder


@pytest.fixture(scope="module")
def folder(private: Path) -> Path:
    words = ("--ratio", "mlp=0.3,attention=0.5", "--calibration", private / "my notes.txt", "--samples", 8)
    more = ("--evaluate", private / "my notes.txt", "--sequence-length", 32, "--output", private / "cut")
    result = compress("--model", private / "my llama", *words, *more)
    assert result.exit_code == 0, result.output
    return private / "cut"


@pytest.fixture(scope="module")
def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_round_trip(folder: Path, card: ModelCard) -> None:
    assert str(card) == (folder / "README.md").read_text()
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prune-peak", "pruning", "peak-ablation", "arxiv:2408.17322"],
        "license": "other",
        "license_name": "mini",
        "language": ["en"],
    }


def test_a_data_set_is_named(folder: Path, tmp_path: Path) -> None:
    recipe = json.loads((folder / "prune_peak.json").read_text())
    recipe["options"]["calibration"] = ["someone/words"]
    write_card(tmp_path, recipe, open_model(str(EXAMPLES / "llama-mini")))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["someone/words"]
    assert "8 windows of 32 tokens of someone/words" in card.text
    assert "--calibration someone/words" in card.text


def test_the_numbers_are_those_of_the_recipe(folder: Path, card: ModelCard) -> None:
    recipe = json.loads((folder / "prune_peak.json").read_text())
    before, after = recipe["before"], recipe["after"]
    assert f"| parameters | {before['parameters']:,} | {after['parameters']:,} |" in card.text
    assert f"| bytes | {before['bytes']:,} | {after['bytes']:,} |" in card.text
    first, second = (recipe["quality"][when] for when in ("before", "after"))
    assert (
        f"| perplexity | {first['value']:.2f} ± {first['standard_error']:.2f} | {second['value']:.2f} ± " in card.text
    )
    assert f"Perplexity on my notes.txt: {first['windows']} non-overlapping windows of 32 tokens" in card.text
    saved = 1 - after["parameters"] / before["parameters"]
    asked = "(asked 30%: multiples of 8)"
    assert f"50.0% of the attention neurons and 29.2% of the MLP neurons {asked} of `my llama`" in card.text
    assert f"were pruned ({saved:.1%} of its parameters)" in card.text
    for site in recipe["sites"].values():
        assert 0 < site["lost"] < 0.99
        assert 0 < site["kept"] < site["neurons"]


def test_card_has_no_local_paths(folder: Path) -> None:
    for path in folder.iterdir():
        assert b"private-directory" not in path.read_bytes(), path


def test_links_and_pictures_resolve(folder: Path, card: ModelCard) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", card.text)
    assert [target for target in targets if target.startswith("http")] == ["https://arxiv.org/abs/2408.17322"]
    for target in targets:
        assert target.startswith("http") or (folder / target).is_file(), target
    for name in re.findall(r"`(prune_peak[\w.]+)`", card.text):
        assert (folder / name).is_file(), name


def test_card_code_loads_the_model(folder: Path, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert names["tokenizer"]("it")["input_ids"]


@pytest.mark.draws
def test_card_command_reproduces_the_folder(
    private: Path, folder: Path, card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(private)
    assert "In a folder with `my llama` and `my notes.txt`:" in card.text
    assert "a local folder without an id of the Hub, so `base_model` is not set" in card.text
    assert run_pasted(card) == ["compress", "verify"]
    for path in folder.iterdir():
        assert path.read_bytes() == (private / "pruned" / path.name).read_bytes(), path.name


def run_pasted(card: ModelCard) -> list[str]:
    """The names of the commands of a card, which all run as they are."""
    names = []
    for block in re.findall(r"```\n(prune-peak .*?)```", card.text, re.DOTALL):
        for command in filter(None, block.replace("\\\n", "").split("\n")):
            words = shlex.split(command)[1:]
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output
            names.append(words[0])
    return names


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(folder: Path, card: ModelCard) -> None:
    markdown = pytest.importorskip("markdown_it")
    pytest.importorskip("matplotlib")
    page = folder.parent / "card.html"
    body = markdown.MarkdownIt("commonmark").enable("table").render(card.text)
    page.write_text(f'<base href="{folder.as_uri()}/">{WATCH}{body}')
    shown = dump(page)
    assert "width 900" in shown
    assert "data-refused" not in shown
    assert shown.count("<tr>") == 4  # the head, parameters, bytes, perplexity


@pytest.mark.parametrize("front", ["no front matter", "---\nlicense: [\n---\n", "---\n- a\n- list\n---\n", "\xff"])
def test_source_card_without_fields(front: str, tmp_path: Path, text: Path) -> None:
    source = shutil.copytree(EXAMPLES / "opt-mini", tmp_path / "opt mini")  # a blank: no id of the Hub
    (source / "README.md").write_bytes(front.encode("latin-1"))
    words = ("--ratio", 0.3, "--samples", 2, "--sequence-length", 16, "--calibration", text, "--no-refit")
    result = compress("--model", source, *words, "--output", tmp_path / "cut")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "cut" / "README.md")
    assert card.data.license is None
    assert card.data.base_model is None
    assert "refit left" not in card.text


@pytest.mark.draws
def test_without_matplotlib_the_table_is_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    prune_peak.compress(
        str(EXAMPLES / "opt-mini"), 0.3, tmp_path / "cut", samples=2, sequence_length=16, calibration=str(text)
    )
    said = [record.message for record in caplog.records if record.name == "prune_peak.export.card"]
    assert said == ["The card has no picture, because matplotlib is not installed: pip install 'prune-peak[plots]'."]
    card = ModelCard.load(tmp_path / "cut" / "README.md")
    assert "| parameters |" in card.text
    assert "prune_peak.png" not in card.text
    assert not (tmp_path / "cut" / "prune_peak.png").exists()


@pytest.mark.parametrize(
    ("model_class", "task"),
    [
        ("GraniteForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertModel", "feature-extraction"),
        ("ViTForImageClassification", "image-classification"),
        ("ViTModel", "image-feature-extraction"),
    ],
)
def test_the_task_is_that_of_the_class(model_class: str, task: str) -> None:
    assert find_task(getattr(transformers, model_class)) == task


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("base_model: someone/model", "someone/model"),
        ("base_model: [someone/model, a b]", ["someone/model"]),
        ("base_model: ./my model", None),
        ("base_model: no", None),
    ],
)
def test_the_base_is_that_of_the_source_card(front: str, expected: object, folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLES / "llama-mini", tmp_path / "someone-llama")
    (source / "README.md").write_text(f"---\n{front}\n---\n")
    write_card(tmp_path, json.loads((folder / "prune_peak.json").read_text()), open_model(str(source)))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == expected
    assert ("is not set" in card.text) == (expected is None)
    assert card.data.to_dict().get("base_model_relation") == ("finetune" if expected else None)


def test_a_folder_of_the_cache_has_its_id(tmp_path: Path) -> None:
    path = tmp_path / "models--some--opt-mini" / "snapshots" / "0123abc"
    model = open_model(str(shutil.copytree(EXAMPLES / "opt-mini", path)))
    assert model.origin == ("some/opt-mini", "0123abc")
    assert model.label == "some/opt-mini"


def test_images_are_images(tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(VIT.save(tmp_path / "a vit: #1"))
    (tmp_path / "my images").mkdir()
    for number in range(8):
        pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "my images" / f"{number}.png")
    words = ("--ratio", 0.3, "--samples", 8, "--calibration", tmp_path / "my images", "--output", tmp_path / "cut")
    result = compress(tmp_path / "a vit: #1", *words)
    assert result.exit_code == 0, result.output
    assert "held-out images" in result.stdout
    card = ModelCard.load(tmp_path / "cut" / "README.md")
    assert "8 images of my images" in card.text
    assert "larger on images of another kind" in card.text
    assert "token" not in card.text + result.stdout
    assert "prune-peak verify pruned --original './a vit: #1'" in card.text
