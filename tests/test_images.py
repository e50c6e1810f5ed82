"""Vision models: calibrated on folders of images, evaluated on labelled ones."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from PIL import Image
from tiny import BY_NAME
from transformers import AutoImageProcessor, AutoModelForImageClassification

from prune_peak.cli.main import main
from prune_peak.data.images import choose_images, read_data_set, read_labelled
from prune_peak.errors import PrunePeakError
from prune_peak.evaluation.quality import build_given_eval_set, measure_quality
from prune_peak.models.loading import Model, open_model

VIT, DIGITS = EXAMPLES / "vit-mini", EXAMPLES / "digits"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def compress(output: Path, *more: object, model: Path = VIT) -> Result:
    words = ("--model", model, "--ratio", 0.3, "--output", output, "--calibration", DIGITS / "calibration", "-q")
    return run("compress", *words, *more)


@pytest.fixture
def source() -> Model:
    return open_model(str(VIT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve good images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((DIGITS / "calibration").iterdir())[:12]:
        shutil.copy(path, folder)
    return folder


def test_images_pass_through_the_models_own_processor(source: Model, folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(VIT)
    images = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    (folder / ".DS_Store").touch()
    assert torch.equal(choose_images(str(folder), source, 100, seed=0).calibration, expected)
    few, others = (choose_images(str(folder), source, 4, seed).calibration for seed in (0, 1))
    assert few.shape == (4, 3, 8, 8)
    assert not torch.equal(few, others)


@torch.inference_mode()
def test_pixels_equal_those_of_transformers(source: Model) -> None:
    pixels, labels = read_labelled(str(DIGITS / "held-out"), source)
    logits = AutoModelForImageClassification.from_pretrained(VIT)(pixel_values=pixels).logits
    quality = measure_quality(source, build_given_eval_set(source, [str(DIGITS / "held-out")], 0))
    assert quality.metric == "image accuracy"
    assert quality.windows == len(labels) == 360
    assert quality.value == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert quality.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert quality.value > 0.9


def write_bad(name: str, folder: Path) -> None:
    path = folder / "bad.png"
    if name == "truncated":
        Image.new("RGB", (64, 64), "red").save(path)
        path.write_bytes(path.read_bytes()[:100])
    elif name == "not an image":
        path.write_text("a recipe for bread")
    elif name == "a program for ghostscript":
        Image.new("RGB", (64, 64)).save(path, format="EPS")
    elif name == "empty":
        path.touch()
    elif name == "a million pixels long":
        Image.new("1", (1_000_000, 1)).save(path)
    elif name == "more pixels than memory":
        good = min((DIGITS / "calibration").iterdir()).read_bytes()
        header = good[12:16] + (60_000).to_bytes(4, "big") * 2 + good[24:29]  # claims 60,000 x 60,000
        path.write_bytes(good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:])


BAD = ["truncated", "not an image", "a program for ghostscript", "empty", "a million pixels long"]


@pytest.mark.parametrize("name", [*BAD, "more pixels than memory"])
def test_a_bad_image_is_refused_by_its_name(name: str, source: Model, folder: Path) -> None:
    write_bad(name, folder)
    with pytest.raises(PrunePeakError, match=r"bad\.png (is not a readable image|is 1000000 x 1;)"):
        choose_images(str(folder), source, 100, seed=0)


def test_folders_that_cannot_be_used_are_refused(source: Model, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrunePeakError, match="has no image"):
        choose_images(str(tmp_path / "empty"), source, 8, seed=0)
    with pytest.raises(PrunePeakError, match="has 1 image; expected at least 2"):
        choose_images(str(folder), source, 1, seed=0)
    with pytest.raises(PrunePeakError, match=r"is not a label of .*vit-mini \(0, 1, 2, \.\.\.\)"):
        read_labelled(str(folder), source)
    with pytest.raises(PrunePeakError, match="is not a folder"):
        read_labelled(str(folder / "none"), source)
    tower = open_model(str(BY_NAME["siglip-tower"].save(tmp_path / "tower")))
    with pytest.raises(PrunePeakError, match="does not classify images"):
        build_given_eval_set(tower, [str(DIGITS / "held-out")], 0)


def test_a_processor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path = BY_NAME["vit"].save(tmp_path / "vit")
    with pytest.raises(PrunePeakError, match="has no image processor"):
        choose_images(str(folder), open_model(str(path)), 8, seed=0)
    shutil.copy(VIT / "preprocessor_config.json", path)
    with pytest.raises(PrunePeakError, match=r"3 x 8 x 8 .* Use the processor that belongs to the model"):
        choose_images(str(folder), open_model(str(path)), 8, seed=0)


def test_a_data_set_of_images_is_read_where_the_extra_is_there(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    images = list(read_data_set(str(folder), 5, seed=0))
    assert [image.size for image in images] == [(8, 8)] * 5
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(PrunePeakError, match=r"set has no column of images, only text\."):
        list(read_data_set(str(tmp_path / "set"), 5, seed=0))


@pytest.mark.parametrize("sites", ["mlp", "attention"])
def test_a_vision_model_is_cut_on_images(sites: str, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    result = compress(output, "--evaluate", DIGITS / "held-out", "--sites", sites, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["quality_after"]["value"] > answer["quality_before"]["value"] - 0.05
    assert answer["after"]["parameters"] < answer["before"]["parameters"]
    assert (output / "preprocessor_config.json").read_bytes() == (VIT / "preprocessor_config.json").read_bytes()
    recipe = json.loads((output / "prune_peak.json").read_text())
    assert recipe["options"]["samples"] == 48
    assert recipe["options"]["sequence_length"] is None
    assert "48 images of calibration" in (output / "README.md").read_text()
    assert run("verify", output, "--original", VIT, "-q").exit_code == 0


def test_there_are_no_images_of_the_models_own(tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        result = run("compress", "--model", VIT, "--ratio", 0.3, "--output", tmp_path / "cut", *more)
        assert result.exit_code == 1
        assert "pass a folder of images, or a Hub data set, with --calibration" in result.stderr
    assert not list(tmp_path.iterdir())


def test_statistics_of_images_are_kept(tmp_path: Path) -> None:
    words = ("--model", VIT, "--output", tmp_path / "vit.stats", "--calibration", DIGITS / "calibration")
    result = run("calibrate", *words, "--samples", 100, "-q")
    assert "8 sites measured on 100 images of calibration" in result.stdout
    result = compress(tmp_path / "cut", "--stats", tmp_path / "vit.stats", "--no-refit")
    assert result.exit_code == 0, result.output
    assert "AutoImageProcessor.from_pretrained" in result.stdout
    assert "perplexity" not in result.stdout


def test_a_dry_run_on_images(tmp_path: Path) -> None:
    result = compress(tmp_path / "cut", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert 0 < answer["minutes"] < 10
    assert answer["disk"] == answer["bytes_after"]
