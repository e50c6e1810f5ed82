"""Models of several towers: the text tower is pruned by text, the others are copied."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import EXAMPLES

import prune_peak
from prune_peak.io.checkpoint import Checkpoint


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A tiny LLaVA with the tokenizer of an example."""
    text = transformers.AutoConfig.from_pretrained(EXAMPLES / "llama-mini")
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=1023, image_seq_length=4)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model = transformers.AutoModel.from_pretrained(EXAMPLES / "llama-mini")
    model.save_pretrained(tmp_path / "llava")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLES / "llama-mini" / name, tmp_path / "llava" / name)
    return tmp_path / "llava"


def test_the_text_tower_of_llava_is_pruned(llava: Path, text: Path, tmp_path: Path) -> None:
    """Its images are seen as before: what the vision tower and the projector have is copied byte for byte."""
    output = tmp_path / "out"
    result = prune_peak.compress(str(llava), 0.3, output, calibration=str(text), samples=8, sequence_length=64)
    assert result.verification.passed
    assert result.after.parameters < result.before.parameters
    written = transformers.AutoModelForImageTextToText.from_pretrained(output)
    assert written.config.text_config.intermediate_size == 272
    assert written.config.text_config.mlp_bias
    before, after = Checkpoint(llava), Checkpoint(output)
    seen = [name for name in before.names if "vision_tower" in name or "projector" in name]
    assert len(seen) > 20
    for name in seen:
        torch.testing.assert_close(after.read(name), before.read(name), rtol=0, atol=0)
    ids = torch.tensor([[5, 1023, 1023, 1023, 1023, 7, 8]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = written(input_ids=ids, pixel_values=pixels).logits
        original = transformers.AutoModelForImageTextToText.from_pretrained(llava)
        expected = original(input_ids=ids, pixel_values=pixels).logits
    assert bool(logits.isfinite().all())
    nearness = torch.nn.functional.cosine_similarity(logits[0], expected[0])
    assert nearness.min() > 0.5


def test_inspect_names_the_other_tower(llava: Path) -> None:
    inspection = prune_peak.inspect(str(llava), 0.3)
    assert "it belongs to" in inspection.unprunable["left whole: vision_config.intermediate_size"]


def test_heads_of_the_text_tower(llava: Path, text: Path, tmp_path: Path) -> None:
    options = {"calibration": str(text), "samples": 8, "sequence_length": 64}
    prune_peak.compress(str(llava), 0.5, tmp_path / "out", sites=("attention",), unit="group", **options)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.text_config.num_attention_heads, config.text_config.num_key_value_heads) == (2, 1)
